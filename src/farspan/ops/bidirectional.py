"""Looking both ways with operators that only look back: once over the sequence, once over its reversal."""

from collections.abc import Callable

from torch import Tensor

from farspan.ops import varlen


def both_ways(run: Callable[..., Tensor], *tensors: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """A causal operator in both directions, added up.

    With R the reversal of every sequence along its length:

        out = run(x_1, …, x_n) + R run(R x_1, …, R x_n)

    Token t so reads what lies before it through the first term and what lies behind it through the second. It reads
    itself in both: its own contribution counts twice.

    Args:
        run: a causal operator of the tensors that returns one tensor of the same length; parameters that have no
            length, and `cu_seqlens`, are bound to it beforehand. It is called twice.
        *tensors: what runs along the sequence, `[B, T, …]` (`[1, N, …]` when packed); None is handed on as None.
        cu_seqlens: boundaries of packed documents, int32 `[num_seqs + 1]`; each is reversed in its own place, so that
            the same boundaries describe the reversal.

    Returns:
        `[B, T, …]`, as `run` returns it.

    Cost:
        Twice that of `run`, and two reversals.

    Note:
        The published code of the state mechanisms is causal; this is the library's definition of their bidirectional
        form. It turns round with its input: `both_ways(run, R x) = R both_ways(run, x)`.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3)
        >>> both_ways(lambda x: x.cumsum(1), x).tolist()
        [[8.0, 9.0, 11.0]]
    """
    turned = [None if x is None else varlen.reverse(x, cu_seqlens) for x in tensors]
    return run(*tensors) + varlen.reverse(run(*turned), cu_seqlens)
