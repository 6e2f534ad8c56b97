"""Files in and out: atomic writing, samples as files people open."""
