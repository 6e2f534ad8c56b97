"""GDSS: graphs and molecules by a system of SDEs for nodes and edges (Jo, Lee and Hwang 2022, 2202.02514)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_sgm.denoiser import Preconditioning
from lightning_sgm.joint_denoiser import JointDenoiser
from lightning_sgm.methods.base import Batch, Curve, GenerativeModule
from lightning_sgm.methods.denormals import without_denormals
from lightning_sgm.methods.graph_checks import require_clipping, require_judges, require_node_mask
from lightning_sgm.methods.graph_pictures import loss_curves, reverse_strips
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.metrics.graphs import describe
from lightning_sgm.networks.base import Network, Spec, build
from lightning_sgm.objectives.joint import JointObjective
from lightning_sgm.processes.gaussian import as_time
from lightning_sgm.processes.graph import Graph, GraphProcess, masked
from lightning_sgm.random import Draw
from lightning_sgm.samplers.grids import UniformTime
from lightning_sgm.samplers.hooks import Langevin
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.splitting import S4

Start = Literal["standard", "matched"]
_COMPONENTS = ("x", "adj")
_ATTEMPTS = 20
_KEPT = 0.1  # share of the data's amplitude at t = 1 above which N(0, 1) is visibly another law


class GDSS(GenerativeModule):
    """Node features and adjacency diffuse together; two networks give the partial scores of the reverse system.

    Samples are whole: an entry of the adjacency is rounded to the nearest of 0 .. spec["bonds"], and of a molecule's
    node features the largest above 0.5 becomes the atom's type (none: no atom).

    Args:
        network: the pair of networks, or a factory that receives ``spec``: network(state, label, node_mask=...).
        process: Gaussian processes of ``x`` and ``adj``.
        x_preconditioning: what is predicted for the node features; the authors' networks give the noise under VP and
            sub-VP, and the score itself under VE.
        adj_preconditioning: what is predicted for the adjacency.
        objective: law of the times and the weights.
        sampler: rule, grid and hooks; the paper's solver S4 by default.
        start: where sampling starts. "standard": N(0, 1), as the paper does whatever the process; "matched": a normal
            law with the mean and variance that data have at t = 1, from the statistics in ``spec``.
        nodes: number of nodes of all samples; None: drawn from those of the training graphs.
        connected: draw a sample again, with other noise and as many nodes, until it is in one piece (20 times at
            most): the model's law given that. The mean number of evaluations tells what it costs.
        spec, optimizer, warmup, decay, exact, drop, metrics, test_samples, val_samples: see :class:`GenerativeModule`;
            Adam at 0.01 with the paper's L2 decay of 1e-4, and 0.999 per epoch. ``trainer.gradient_clip_val`` holds for
            each of the two networks, and for the embedding of the time where they have one.
    """

    def __init__(
        self,
        network: Network | Callable[[Spec], Network],
        spec: dict[str, Any],
        process: GraphProcess = GraphProcess(),
        x_preconditioning: Preconditioning = Preconditioning(),
        adj_preconditioning: Preconditioning = Preconditioning(),
        objective: JointObjective = JointObjective(reduction="half_sum"),
        sampler: Sampler = Sampler(
            rule=S4(corrector=Langevin(snr=0.05, noise_scale=0.7)), steps=1000, grid=UniformTime(t_min=1e-4)
        ),
        start: Start = "standard",
        nodes: int | None = None,
        connected: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-4),
        warmup: int = 0,
        decay: Decay = 0.999,
        exact: bool = False,
        drop: dict[str, float] | None = None,
        metrics: list[Metric] | None = None,
        test_samples: int = 128,
        val_samples: int = 0,
    ) -> None:
        super().__init__(
            spec=spec,
            optimizer=optimizer,
            warmup=warmup,
            decay=decay,
            exact=exact,
            drop=drop,
            metrics=metrics,
            test_samples=test_samples,
            val_samples=val_samples,
        )
        self.record(locals())
        if spec.get("kind") not in ("graph", "molecule"):
            raise ValueError(f"GDSS is for graphs and molecules, got data of kind {spec.get('kind', 'unknown')!r}")
        if start not in ("standard", "matched"):
            raise ValueError(f"start must be standard or matched, got {start!r}")
        if start == "matched" and "edge_mean" not in spec:
            raise ValueError(
                "start: matched needs statistics of the data, which imported models have not: fit and test take them "
                "from --data, and predict from the checkpoint that such a fit wrote"
            )
        if nodes is not None and not 1 <= nodes <= spec["nodes"]:
            raise ValueError(f"nodes must be in 1 .. {spec['nodes']}, the largest graph of the data, got {nodes}")
        self.network = build(network, spec)
        self.process = process
        self.objective = objective
        self.sampler = copy.copy(sampler)  # it counts evaluations, and a default is shared by all models
        preconditioning = {"x": x_preconditioning, "adj": adj_preconditioning}
        self.denoiser = JointDenoiser(self.network, process, preconditioning)
        self.start: Start = start
        self.nodes, self.connected = nodes, connected
        self._evaluations = 0.0

    def on_fit_start(self) -> None:
        """Refuse what would stop training later; say what is trained, and where its samples will start wrong."""
        require_clipping(self.trainer)
        require_judges(self)
        super().on_fit_start()
        kept = {name: float(part.alpha(as_time(1.0))) for name, part in self.process.items()}
        if self.start == "standard" and max(kept.values()) > _KEPT:
            told = ", ".join(f"{value:.0%} of {name}" for name, value in kept.items())
            rank_zero_warn(
                f"at t = 1 the process keeps {told}, so samples that start from N(0, 1) start elsewhere than training "
                "ended. That is the paper's choice; model.start: matched starts from the data's mean and variance"
            )

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Denoising error of nodes and edges per graph, (B,): "loss" = "loss_x" + "loss_adj"."""
        state = {name: batch[name] for name in _COMPONENTS}
        with without_denormals():
            terms: dict[str, Tensor] = self.objective(self.denoiser, state, draw, **self.conditions(batch))
        return terms

    # Each piece of work flushes denormals for itself: Lightning tells a model that a fit begins, not that it failed.

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's, with denormals as 0."""
        with without_denormals():
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, with denormals as 0."""
        with without_denormals():
            super().optimizer_step(*args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each network on its own: one learning slowly does not slow the other.

        What both networks share, the embedding of the time under ``time: true``, is clipped on its own too.
        """
        if not gradient_clip_val:
            return
        own = self.network.parameters(recurse=False)  # a network of yours may have parameters in no part
        for parameters in map(list, (own, *(part.parameters() for part in self.network.children()))):
            if parameters:
                torch.nn.utils.clip_grad_norm_(parameters, float(gradient_clip_val))

    # Sampling.

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """Graphs ``x`` (n, N, F), ``adj`` (n, N, N) and ``node_mask`` (n, N), N the data's largest number of nodes.

        Args:
            indices: (n,) numbers of the samples.
            conditions: ``node_mask`` (n, N) bool, its nodes first, to say which nodes each graph has.

        Raises:
            ValueError: node_mask has another form, or more nodes than the data's largest graph.
        """
        node_mask = conditions.get("node_mask")
        if node_mask is None:
            node_mask = self.draw_node_mask(indices)
        else:
            require_node_mask(node_mask, len(indices), self.spec["nodes"])
        found = self._attempt(indices, node_mask, 0)
        spent = self.sampler.evaluations * len(indices)
        for attempt in range(1, _ATTEMPTS if self.connected else 1):
            again = self._in_pieces(found).nonzero()[:, 0]
            if not len(again):
                break
            drawn = self._attempt(indices[again], node_mask[again], attempt)
            found = {name: value.index_copy(0, again, drawn[name]) for name, value in found.items()}
            spent += self.sampler.evaluations * len(again)
        self._evaluations = spent / max(1, len(indices))
        return found

    @property
    def sampler_evaluations(self) -> float:
        """Network evaluations per sample in the latest call of :meth:`sample`, all attempts included."""
        return self._evaluations

    def _attempt(self, indices: Tensor, node_mask: Tensor, attempt: int) -> Batch:
        if not len(indices):  # the share of a process where there are fewer samples than processes
            shapes = {"x": (0, 0, self.spec["features"]), "adj": (0, 0, 0)}
            return self.whole({name: torch.zeros(s, device=self.device) for name, s in shapes.items()}, node_mask)
        width = int(node_mask.sum(1).max())  # waits for the device, once for all steps
        return self.whole(self.run(indices, node_mask[:, :width], attempt=attempt), node_mask)

    def _in_pieces(self, samples: Batch) -> Tensor:
        """(n,) bool: what is not in one piece. An atom alone is a piece; a node of a plain graph alone is none."""
        if self.spec["kind"] != "molecule":
            return describe(samples["adj"], samples["node_mask"], ())["connected"][:, 0] == 0
        atoms = samples["x"].any(2)
        adj = masked(samples, atoms)["adj"]
        alone = atoms & ~adj.any(2)
        connected = describe(adj, atoms, ())["connected"][:, 0] == 1
        return ~connected | (alone.any(1) & (atoms.sum(1) > 1)) | ~atoms.any(1)

    def run(
        self,
        indices: Tensor,
        node_mask: Tensor,
        on_step: Callable[[int, Any, Any], None] | None = None,
        attempt: int = 0,
    ) -> Graph:
        """The state at the end of the reverse process of samples with ``node_mask`` (n, N), not yet whole."""
        draw = self.sample_draw(indices)
        draw = draw.fork(attempt) if attempt else draw
        batch, width = node_mask.shape
        empty = {
            "x": torch.zeros(batch, width, self.spec["features"], device=self.device),
            "adj": torch.zeros(batch, width, width, device=self.device),
        }
        noise = self.process.noise_like(empty, draw, {"node_mask": node_mask})
        start = noise if self.start == "standard" else masked(self._matched(noise), node_mask)
        with without_denormals():
            state: Graph = self.sampler(self.denoiser, None, draw, start=start, on_step=on_step, node_mask=node_mask)
        return state

    def draw_node_mask(self, indices: Tensor) -> Tensor:
        """(n, N) bool with numbers of nodes as in the training graphs, or ``nodes`` for all."""
        largest = self.spec["nodes"]
        position = torch.arange(largest, device=self.device)
        if self.nodes is not None:
            return (position < self.nodes).expand(len(indices), largest)
        counts = torch.tensor(self.spec["node_counts"], dtype=torch.float64, device=self.device)
        uniform = self.sample_draw(indices).fork(0).uniform((len(indices),), torch.float64)
        drawn = torch.searchsorted(counts.cumsum(0) / counts.sum(), uniform, right=True).clamp_max(largest)
        return position < drawn[:, None]

    def _matched(self, noise: Graph) -> Graph:
        """Noise with the mean and variance of the data at t = 1; the diagonal of the adjacency stays 0."""
        found = {}
        for name, key in zip(_COMPONENTS, ("feature", "edge"), strict=True):
            level = self.process[name].level(1.0)
            mean, std = (torch.tensor(self.spec[f"{key}_{part}"]).to(noise[name]) for part in ("mean", "std"))
            scale = torch.sqrt((level.alpha * std) ** 2 + level.sigma**2).to(noise[name])
            found[name] = float(level.alpha) * mean + scale * noise[name]
        found["adj"] = found["adj"] - torch.diag_embed(found["adj"].diagonal(dim1=1, dim2=2))
        return found

    def whole(self, state: Graph, node_mask: Tensor) -> Batch:
        """Samples from what :meth:`run` gives: rounded, and padded to the width of ``node_mask``."""
        missing = node_mask.shape[1] - state["adj"].shape[1]
        adj = torch.floor(state["adj"] + 0.5).clamp(0, self.spec["bonds"])
        x = state["x"]
        if self.spec["kind"] == "molecule":
            chosen = x.argmax(2, keepdim=True)
            x = torch.zeros_like(x).scatter_(2, chosen, (x.gather(2, chosen) > 0.5).to(x))
        pad = torch.nn.functional.pad
        whole = {"x": pad(x, (0, 0, 0, missing)), "adj": pad(adj, (0, missing, 0, missing))}
        return {**masked(whole, node_mask), "node_mask": node_mask}

    def pictures(self) -> dict[str, Batch | Curve]:
        """Graphs coming out of the noise, and the losses over time."""
        with without_denormals():
            return {"reverse_process": reverse_strips(self), **loss_curves(self)}
