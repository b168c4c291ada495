"""Logits of some positions are those of all, whoever computes them, and no more of them exist than are read at once."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from helpers import benchmark_fixtures as fix
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from macdrop.masking import attacked
from tune.evaluation import logits as module
from tune.evaluation.logits import is_unsplit, plain_logits
from tune.evaluation.perplexity import losses_of
from tune.evaluation.prefix_cache import PrefixCache
from tune.forward.head import SplitModel


def block_mask(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bool mask (1, 1, T, T) and the positions (1, T) of texts side by side that do not see each other."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None, :]).tril()
    return mask[None, None], torch.cat([torch.arange(n) for n in lengths])[None]


def batch(rows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 258, (rows, length), generator=generator)
    return ids, torch.rand(rows, length, generator=generator) < 0.4


@torch.no_grad()
@pytest.mark.parametrize("run", [plain_logits, PrefixCache().logits], ids=["plain", "cache"])
def test_some_logits_are_those_of_all(model, run):
    ids, at = batch()
    want = model(ids).logits
    assert torch.equal(run(model, ids), want)
    assert torch.allclose(run(model, ids, at=at), want[at], rtol=1e-6, atol=1e-6)
    rows, columns = torch.tensor([2, 0, 2]), torch.tensor([1, 5, 0])
    assert torch.allclose(run(model, ids, at=(rows, columns)), want[rows, columns], rtol=1e-6, atol=1e-6)
    assert run(model, ids, at=torch.zeros_like(at)).shape == (0, 258)


class Entangled(transformers.LlamaForCausalLM):
    """A model whose logits are not made of hidden states alone."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits + input_ids[..., None] / 100
        return output


@torch.no_grad()
def test_model_that_cannot_be_split_is_run_whole(model):
    entangled = Entangled(model.config).eval()
    ids, at = batch()
    assert SplitModel.of(entangled) is None and SplitModel.of(model) is not None
    want = entangled(ids).logits[at]
    assert not is_unsplit(entangled)  # not known before
    assert torch.equal(plain_logits(entangled, ids, at=at), want)
    assert torch.equal(plain_logits(entangled, ids, at=at, read=lambda logits, _: logits), want)
    assert is_unsplit(entangled) and not is_unsplit(model)


@torch.no_grad()
def test_packed_texts_get_the_logits_they_get_alone(model):
    ids, _ = batch(1, 12)
    mask, positions = block_mask([5, 7])
    packed = plain_logits(model, ids, mask, positions=positions, at=torch.ones_like(ids, dtype=torch.bool))
    alone = torch.cat([model(part).logits[0] for part in ids.split([5, 7], dim=1)])
    assert torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
def test_what_is_read_does_not_depend_on_the_chunk(model, monkeypatch, rows):
    ids, at = batch()
    targets = ids[at]
    whole = losses_of(targets)(plain_logits(model, ids)[at], slice(None))
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * 4 * 258)
    sizes = []

    def read(logits: torch.Tensor, part: slice) -> torch.Tensor:
        sizes.append(len(logits))
        return losses_of(targets)(logits, part)

    found = plain_logits(model, ids, at=at, read=read)
    assert torch.allclose(found, whole, rtol=1e-6, atol=1e-6)
    assert max(sizes) <= rows and sum(sizes) == len(targets)
    assert torch.equal(plain_logits(model, ids, at=at, read=losses_of(targets)), found)
    assert plain_logits(model, ids, at=torch.zeros_like(at), read=losses_of(targets[:0])).shape == (0,)


def test_what_reads_needs_positions(model):
    with pytest.raises(AssertionError, match="positions"):
        plain_logits(model, batch()[0], read=losses_of(torch.zeros(1, dtype=torch.long)))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def test_no_tensor_is_larger_than_a_chunk_of_logits(model, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * 4 * 258)
    ids, _ = batch(4, 64)
    at = torch.ones_like(ids, dtype=torch.bool)
    with Largest() as all_at_once:
        plain_logits(model, ids, at=at)
    with Largest() as in_chunks:
        plain_logits(model, ids, at=at, read=losses_of(ids[at]))
    assert all_at_once.elements == math.prod(ids.shape) * 258
    assert in_chunks.elements <= max(16 * 258, math.prod(ids.shape) * fix.FFN, 4 * 4 * 64 * 64)


@torch.no_grad()
def test_attacks_share_what_lies_below_them_whatever_is_asked(model):
    weights = fix.massive(model)
    ids, at = batch(1, 12)
    mask, positions = block_mask([5, 7])
    spread = 2 * torch.arange(12)[None]
    asked = [{"mask": mask, "positions": positions}, {"mask": mask}, {}, {"positions": spread}]
    cache, plain, shared = PrefixCache(), [], []
    for attack in ("zeroing", "retaining", "random"):
        with attacked(model, weights, attack, 3), cache.sharing(model, weights, "text"):
            plain += [plain_logits(model, ids, at=at, **options) for options in asked]
            shared += [cache.logits(model, ids, at=at, **options) for options in asked]
    assert all(torch.equal(one, other) for one, other in zip(plain, shared, strict=True))
    assert len({tuple(logits.flatten().tolist()) for logits in plain[:4]}) == 4  # masks and positions matter
    assert cache.calls_saved == len(asked) * 2 - 1  # the attention of layer 0, but for the batch that proves it
