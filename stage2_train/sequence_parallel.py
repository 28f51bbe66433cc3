"""Sequence parallel: the ranks of a group share each packed row, a slice of its tokens each (Ulysses).

Nearly all of a model works token by token. In an attention layer one exchange turns (all heads, own tokens) into (own
heads, all tokens), attention runs with the boundaries of the whole row, and a second exchange turns its output back;
gradients take the same ways. The scheme is DeepSpeed's, https://arxiv.org/abs/2309.14509 and 2506.13996.

DeepSpeed is not told: to ZeRO every rank is a data-parallel one. A rank's loss is the sum over the targets that it
holds; what its tokens contribute to the losses of others comes back through the exchanges. So the sum of the ranks'
gradients is the gradient of the sum of their losses, at every stage of ZeRO, as it is without sequence parallel.

All ranks of a group must run the same forward and backward passes, one that holds no target included: each layer
waits for all.

Shape suffixes: B rows, R ranks of the group, T tokens of the whole row, L = T / R tokens of a rank, H query heads,
K heads of keys and values, C heads of one rank, D head size, N targets.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.packed_attention import packed_attention
from shared.padding import Boundaries, PackedBatch

ATTENTION_NAME = "prift_packed_sequence_parallel"


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a row with this one."""

    rank: int
    """Of this process within the group, in [0, size)."""
    size: int
    process_group: torch.distributed.ProcessGroup


def make_group(size: int) -> SequenceGroup:
    """This rank's group: ranks 0 to size - 1 are the first, the next `size` the second; called by all ranks.

    Raises:
        UserError: `size` does not divide the number of ranks.
    """
    num_ranks = torch.distributed.get_world_size()
    if num_ranks % size:
        raise UserError(
            f"train.sequence_parallel={size}: expected a number of ranks that {size} divides, got {num_ranks}"
        )
    process_group, _ = torch.distributed.new_subgroups(size)
    assert isinstance(process_group, torch.distributed.ProcessGroup)
    return SequenceGroup(torch.distributed.get_rank(process_group), size, process_group)


def sequence_parallel_obstacle(model: Any, size: int) -> str | None:
    """Why a transformers model cannot be shared by `size` ranks; None where it can.

    It must be able to run packed besides: see `shared.packed_attention.packing_obstacle`.
    """
    num_heads = model.config.num_attention_heads
    num_key_value_heads = getattr(model.config, "num_key_value_heads", None) or num_heads
    if num_heads % size:
        return f"{size} ranks cannot share {num_heads} attention heads evenly"
    if num_key_value_heads % size and size % num_key_value_heads:
        return f"{size} ranks cannot share {num_key_value_heads} heads of keys and values evenly"
    return None


def use_sequence_parallel_attention(model: Any, group: SequenceGroup) -> None:
    """Make a transformers model run on this rank's part of packed batches only, in place; see `split`.

    The name under which transformers finds the attention is the group's own: models of other groups keep theirs.
    """
    from transformers import AttentionInterface

    name = f"{ATTENTION_NAME}_{group.process_group.group_name}"
    # No mask function is registered under the name, so transformers builds no mask either.
    AttentionInterface.register(name, functools.partial(sequence_parallel_attention, group=group))
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name


def sequence_parallel_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group: SequenceGroup,
    **options: Any,
) -> tuple[Tensor, None]:
    """`shared.packed_attention.packed_attention` on this rank's heads of the whole row; differentiable.

    Args:
        query: (1, H, L, D).
        key, value: (1, K, L, D). Where the group has more ranks than K, several ranks get the same head.
        options: those of `packed_attention`; the boundaries are those of the whole row.

    Returns:
        (1, L, H, D), and no attention weights.

    Raises:
        ValueError: as `packed_attention`.
    """
    if (repeats := group.size // key.shape[1]) > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    parts = [tensor.unflatten(1, (group.size, -1)).permute(1, 0, 3, 2, 4) for tensor in (query, key, value)]
    received_RBLCD = _exchange(torch.cat(parts, dim=3), group)
    heads_BTCD = received_RBLCD.transpose(0, 1).flatten(1, 2).split([part.shape[3] for part in parts], dim=2)
    query, key, value = (tensor_BTCD.transpose(1, 2) for tensor_BTCD in heads_BTCD)
    output_BTCD, _ = packed_attention(module, query, key, value, attention_mask, **options)
    received_RBLCD = _exchange(output_BTCD.unflatten(1, (group.size, -1)).transpose(0, 1), group)
    return received_RBLCD.permute(1, 2, 0, 3, 4).flatten(2, 3), None


def split(batch: PackedBatch, rank: int, size: int) -> tuple[PackedBatch, slice]:
    """The part of a packed batch that one rank of a group holds: L consecutive tokens, and the targets they predict.

    The shift is done: a target stays with the hidden state that predicts it, though its own token may be the first of
    the next part. Where `size` does not divide the tokens, one more example, of id 0 and without targets, ends the row.

    Args:
        batch: whole, on the CPU.
        rank: within the group, in [0, size).

    Returns:
        The part: tokens, positions and targets its own, `starts` and `longest` those of the whole row. And which of
        the whole batch's targets are its own; there may be none.

    Example: ids [5, 6] with a target at 1 and ids [7, 8, 9] with targets at 1 and 2, for two ranks: ids [5, 6, 7] with
    rows [0, 2] and target ids [6, 8]; ids [8, 9, 0] with rows [0] and target ids [9]; starts [0, 2, 5, 6] for both.
    """
    boundaries = batch.boundaries
    num_tokens = batch.input_ids_BT.shape[1]
    num_added = -num_tokens % size
    positions_BT, starts, longest = boundaries.position_ids_BT, boundaries.starts, boundaries.longest
    if num_added:
        positions_BT = torch.cat([positions_BT, torch.arange(num_added)[None]], dim=1)
        starts = torch.cat([starts, starts.new_tensor([num_tokens + num_added])])
        longest = max(longest, num_added)
    length = (num_tokens + num_added) // size
    begin = rank * length
    tokens = slice(begin, begin + length)
    # Hidden rows ascend, from example to example too: what lies between two of them is one slice.
    edges = torch.searchsorted(batch.hidden_rows_N, torch.tensor([begin, begin + length]))
    targets = slice(*edges.tolist())
    part = PackedBatch(
        F.pad(batch.input_ids_BT, (0, num_added))[:, tokens],
        batch.hidden_rows_N[targets] - begin,
        batch.target_ids_N[targets],
        Boundaries(positions_BT[:, tokens], starts, longest),
    )
    return part, targets


class _Exchange(torch.autograd.Function):
    """An all-to-all of equal blocks. It is a permutation and its own inverse, hence its own gradient.

    Not torch's functional one: with activation checkpointing it leaks (https://github.com/pytorch/torchtitan/issues/1467).
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        blocks = blocks.contiguous()
        received = torch.empty_like(blocks)
        torch.distributed.all_to_all_single(received, blocks, group=process_group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.process_group), None


def _exchange(blocks_R: Tensor, group: SequenceGroup) -> Tensor:
    """Block r of (R, ...) to the group's rank r; comes back with block r of (R, ...) from rank r."""
    return _Exchange.apply(blocks_R, group.process_group)
