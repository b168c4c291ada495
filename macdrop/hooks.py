"""MacDrop: drops entries of the frozen massive rows during each training step (paper, section 5).

A mask is Bernoulli(1 - p) of shape (k, d), entry by entry, shared by W_gate and W_up, without rescaling.
Its placebos are other scopes of the same: random rows, all rows, or activations instead of weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from macdrop.config import SCOPES, MacDropConfig, dora_warning
from macdrop.errors import ConfigError, NoMassiveWeights, TrainingInvariantError
from macdrop.families import FFN, decoder_layers, find_ffn
from macdrop.masking.edited_rows import EditedRows
from macdrop.masking.input_dropout import InputDropout
from macdrop.masking.layout import Layout, Span
from macdrop.masking.output_mask import OutputMask

if TYPE_CHECKING:
    from macdrop.weights import MassiveWeights

log = logging.getLogger(__name__)


def keep_mask(
    seed: int,
    micro_step: int,
    p: float,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    place: int | None = None,
) -> torch.Tensor:
    """Boolean mask, true with probability 1 - p: a function of its arguments on every rank.

    micro_step: the number of the mask. place: of one example among those that share the number, where each of them has
    a mask of its own.

    Masks of weights are drawn on the CPU, so that every kind of device has the same; those of activations, which are
    larger than that by far, where these lie.
    """
    key = f"macdrop:{seed}:{micro_step}" if place is None else f"macdrop:{seed}:{micro_step}:{place}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(tuple(shape), generator=generator, device=device) >= p


class MacDrop:
    """Massive weights curriculum dropout on one model.

    model: a causal language model with a PEFT adapter (or bare), its base weights loaded and frozen; under DeepSpeed
        the engine's ``module``. Rows are read once, at `attach`.
    weights: what `find_massive_weights` found for this base; None only where the config is not `enabled`.
    config: scope, k, p0, schedule and seed; when it is not `enabled`, every call here does nothing.

    Around the forward and backward pass of ONE micro-batch::

        drop = MacDrop(model, weights, config)
        drop.attach()
        with drop.micro_step(p, index):
            model(**batch).loss.backward()
        drop.detach()

    A micro-batch may hold the examples of several masks: give spans in place of the index (`begin`). What an example
    sees depends on the number of its mask alone, not on what it shares a micro-batch with.

    With p = 0, in eval mode and when detached the model computes the same bits as without MacDrop.

    `entries_dropped` and `entries_masked` count weight entries over both matrices, summed over the micro-steps with
    p > 0 that ran in training mode; `last_dropped` is of the latest micro-step. With the scope `activations` they count
    entries of the intermediate state on this rank, in the first forward pass of each micro-step. `take_counts` has
    both for each mask.

    The scope `all` keeps a copy of W_gate and W_up, their masked copy and a mask of their size: fine for a placebo.
    With `activations` every forward pass of one micro-step draws the same mask for a batch of the same shape, as
    recomputation under gradient checkpointing must, and so does every rank.
    """

    def __init__(self, model: nn.Module, weights: MassiveWeights | None, config: MacDropConfig) -> None:
        if weights is None and config.enabled:
            raise ConfigError(
                "weights is None: give the scan of the base model (find_massive_weights), or switch MacDrop off."
            )
        self.model, self.config = model, config
        self._weights = weights
        self.entries_dropped = 0
        self.entries_masked = 0
        self.last_dropped = 0
        self._attached = False
        self._begun = False
        self._active = False
        self._rows: tuple[int, ...] = ()
        self._keeps: dict[int, torch.Tensor] = {}
        self._layout: Layout | None = None
        self._counts: dict[int, tuple[int, int]] = {}
        self._counted = False
        self._shape_hook: RemovableHandle | None = None
        self._sites: list[OutputMask | EditedRows | InputDropout] = []

    @property
    def attached(self) -> bool:
        return self._attached

    @property
    def active(self) -> bool:
        """True while a mask is in force: between `begin` and `end`, with p > 0."""
        return self._active

    def attach(self) -> int:
        """Hook the rows; returns their number over all matrices (0 for a disabled config).

        With the scope `activations` it is the number of features of the intermediate state that is hooked. Collective
        under ZeRO-3. Raises `ConfigError` for k above the FFN size and for a model whose rows or activations cannot be
        masked, `NoMassiveWeights` when the scan is of another model, `RuntimeError` when attached already.
        """
        if self._attached:
            raise RuntimeError("this MacDrop is attached already; call detach() first")
        if self.config.enabled:
            self._rows = self._scope_rows()
            ffn = self._target()
            try:
                if SCOPES[self.config.scope].rows is None:
                    self._sites.append(InputDropout(ffn, self._count, routed=self.weights.expert is not None))
                else:
                    self._mask_rows(ffn)
                layer = decoder_layers(self.model)[1][ffn.layer]
                self._shape_hook = layer.register_forward_pre_hook(self._note_shape, with_kwargs=True, prepend=True)
            except BaseException:
                self._remove_sites()
                raise
            assert self._sites, "an FFN without projections"
            self._warn_of_dora()
        self._attached = True
        return sum(site.rows for site in self._sites)

    def detach(self) -> None:
        """Remove every hook and patch, ending an open micro-step; harmless when not attached."""
        self.cancel()
        self._remove_sites()
        self._attached = False

    def begin(self, p: float, micro_step: int | Sequence[Span]) -> None:
        """Draw the masks of one micro-step and put them in force until `end`.

        p: drop probability of an entry, 0 to 1. micro_step: the number of the mask of all tokens, for instance the
        index of the micro-batch since the start of training; with the config's seed it determines the mask. Or spans,
        which give parts of the micro-batch masks of their own; without any span nothing is dropped. Tokens outside the
        spans have the mask of the span before them, but keep all their activations.

        Raises `RuntimeError` when not attached or begun already, `ConfigError` for an impossible p, for spans that
        overlap or end beyond the micro-batch (in its forward pass), and for several masks where `one_mask_at_a_time`.
        """
        if not self._attached:
            raise RuntimeError("MacDrop is not attached; call attach() before begin()")
        if self._begun:
            raise RuntimeError("the micro-step before has not ended; call end() before the next begin()")
        if not 0 <= p <= 1:
            raise ConfigError(f"p is {p!r}; the drop probability must be a number from 0 to 1.")
        layout = Layout(micro_step)
        if len(layout.masks) > 1 and self.one_mask_at_a_time:
            raise ConfigError(
                f"The rows of {self.weights.path} take one mask at a time, but the micro-batch has the masks "
                f"{', '.join(map(str, layout.masks))}.\nGive the examples of each mask a micro-batch of their own."
            )
        self._begun, self._counted, self.last_dropped = True, False, 0
        if p == 0 or not self._sites or not layout.masks:
            return
        self._active, self._layout = True, layout
        try:
            self._open(p, layout)
        except BaseException:
            self.cancel()
            raise

    def _open(self, p: float, layout: Layout) -> None:
        def draw(
            mask: int, shape: Sequence[int], *, device: torch.device | str = "cpu", place: int | None = None
        ) -> torch.Tensor:
            return keep_mask(self.config.seed, mask, p, shape, device, place)

        if SCOPES[self.config.scope].rows is not None:
            shape = (len(self._rows), self.weights.hidden_size)
            self._keeps = {number: draw(number, shape) for number in layout.masks}
        for site in self._sites:
            if isinstance(site, InputDropout):
                site.open(draw, p, layout)
            else:
                site.open(self._keeps, layout)

    def end(self) -> None:
        """Take the mask out of force.

        Raises `RuntimeError` without `begin`, and `TrainingInvariantError` when a masked layer did not run although the
        model trains: a fused kernel went round it, so nothing was dropped.
        """
        if not self._begun:
            raise RuntimeError("end() without begin()")
        active = self.active
        silent = [s for s in self._sites if active and s.module.training and not s.used] if self._must_run else []
        self.cancel()
        if silent:
            names = ", ".join(type(site.module).__name__ for site in silent)
            raise TrainingInvariantError(
                f"MacDrop dropped nothing in this micro-step: {names} of {self.weights.path} did not run in it.\n"
                "Put the forward and backward pass between begin() and end(). If they are, a fused kernel that reads\n"
                "the weights itself goes round the layer: switch it off for this model."
            )

    def cancel(self) -> None:
        """Take the mask out of force without the check of `end`: for a micro-step that failed or never ran."""
        self._begun, self._active, self._layout, self._keeps = False, False, None, {}
        for site in self._sites:
            site.close()

    @contextmanager
    def micro_step(self, p: float, index: int | Sequence[Span]) -> Iterator[MacDrop]:
        """`begin` and `end` around the forward and backward pass of one micro-batch, exceptions included."""
        self.begin(p, index)
        try:
            yield self
        except BaseException:
            self.cancel()
            raise
        self.end()

    @property
    def weights(self) -> MassiveWeights:
        """The scan of the base model; there may be none where MacDrop is off."""
        assert self._weights is not None, "only an enabled MacDrop masks rows"
        return self._weights

    @property
    def _must_run(self) -> bool:
        """Any micro-batch runs the masked layers, except those of one expert: its tokens may all go to others."""
        return bool(self._sites) and self.weights.expert is None

    def take_counts(self) -> dict[int, tuple[int, int]]:
        """Return (dropped, masked) entries for each number of a mask that was used since the last call.

        A mask of rows counts once, however many micro-steps used it, and is the same on every rank; entries of
        activations are those of this rank's examples, and add up.
        """
        counts, self._counts = self._counts, {}
        return counts

    @property
    def one_mask_at_a_time(self) -> bool:
        """True where a micro-batch can have one mask only: rows that are edited in place, and routed tokens."""
        return any(site.one_mask_at_a_time for site in self._sites) or (self._attached and not self._must_run)

    def _count_rows(self) -> None:
        """Called by every site of rows at its first use in a micro-step."""
        self._count(list(self._keeps.items()))

    def _count(self, drawn: list[tuple[int, torch.Tensor]]) -> None:
        """Count masks of one matrix, or of the activations, with their numbers; once in a micro-step."""
        if self._counted:
            return
        self._counted = True
        matrices = sum(site.matrices for site in self._sites)
        before = self._counts if SCOPES[self.config.scope].rows is None else {}
        for number, keep in drawn:
            dropped, masked = matrices * int((~keep).sum()), matrices * keep.numel()
            earlier = before.get(number, (0, 0))
            self._counts[number] = (earlier[0] + dropped, earlier[1] + masked)
            self.last_dropped += dropped
            self.entries_masked += masked
        self.entries_dropped += self.last_dropped

    def _note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the layout the shape of the batch, where it is not yet flattened: before the layer of the rows."""
        if self._layout is not None and module.training:
            states = args[0] if args else kwargs.get("hidden_states")
            if states is not None:
                self._layout.set_shape(states.shape, self.weights.path)

    def _scope_rows(self) -> tuple[int, ...]:
        """The rows whose entries are dropped; none for activations. Raises `ConfigError` for an impossible k."""
        rows = SCOPES[self.config.scope].rows
        return () if rows is None else rows(self.weights, self.config.k, self.config.seed)

    def _mask_rows(self, ffn: FFN) -> None:
        for module in dict.fromkeys(p.module for p in ffn.projections):
            group = [p for p in ffn.projections if p.module is module]
            if group[0].expert_axis:
                self._sites.append(EditedRows(group, self._rows, self._count_rows))
            else:
                name = f"{ffn.path} ({type(module).__name__} {' and '.join(p.role for p in group)})"
                self._sites.append(OutputMask(group, self._rows, self._count_rows, name))

    def _warn_of_dora(self) -> None:
        sparse = [site.fewest_entries for site in self._sites if isinstance(site, OutputMask)]
        entries = min((number for number in sparse if number is not None), default=None)
        warning = None if entries is None else dora_warning(self.config.p0, entries)
        if warning:
            log.warning(warning)

    def _remove_sites(self) -> None:
        if self._shape_hook is not None:
            self._shape_hook.remove()
            self._shape_hook = None
        while self._sites:
            self._sites.pop().remove()

    def _target(self) -> FFN:
        """The FFN that the scan names, checked to be one whose rows can be masked."""
        weights = self.weights
        ffn = find_ffn(self.model, weights.path, weights.expert)
        size = (ffn.intermediate_size, ffn.hidden_size)
        if size != (weights.intermediate_size, weights.hidden_size):
            raise NoMassiveWeights(
                f"The scan is of another model: its FFN {weights.path} has {weights.intermediate_size} features of\n"
                f"hidden size {weights.hidden_size}, this model's has {size[0]} of {size[1]}. Scan this model."
            )
        k = len(self._rows)
        if len(set(self._rows)) < k or not all(0 <= i < ffn.intermediate_size for i in self._rows):
            raise NoMassiveWeights(f"The scan of {weights.path} holds no {k} different rows. Scan the model again.")
        axis = any(p.expert_axis for p in ffn.projections)
        if not ffn.projections or (axis and (weights.expert is None or weights.expert >= (ffn.num_experts or 0))):
            raise NoMassiveWeights(
                f"The scan names expert {weights.expert} of {weights.path}, which has {ffn.num_experts} experts.\n"
                "Scan this model."
            )
        if any(p.tensor.requires_grad for p in ffn.projections):
            raise ConfigError(
                f"The weights of {weights.path} are trainable; MacDrop masks frozen rows while an adapter trains.\n"
                "Put a LoRA or DoRA adapter on the model first, or freeze its base weights."
            )
        if any(getattr(p.wrapper, "merged", False) for p in ffn.projections):
            raise ConfigError("The adapter is merged into the base weights; unmerge it before MacDrop is attached.")
        return ffn
