"""The 2:4 linear layer on sparse tensor cores: y = x W^T + b + s (x A^T) B^T, with W in fragment order.

x [..., cols], W [rows, cols] 2:4 along its columns, b [rows], A [rank, cols], B [rows, rank] -> y [..., rows], all in
bf16 or all in fp16, summed in fp32. Source: mma.sp::ordered_metadata.m16n8k32 of the PTX ISA (9.7.14,
"Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A"); LoRA (Hu et al. 2022,
https://arxiv.org/abs/2106.09685).

The packed form holds what `select_nm(out="compressed")` gives (kernels/nm.py), permuted, so that a lane of a warp finds
its registers side by side. It takes as many bytes. Rows are a multiple of 16, columns of 64.

- ``values``, bf16 or fp16 [rows / 16, cols / 32, 32, 8]: tile (i, s) is rows 16 i .. 16 i + 15 and columns 32 s ..
  32 s + 31 of W, whose compressed columns are 16 s .. 16 s + 15. With g = lane // 4, t = lane % 4, r = 0..3, h = 0, 1:

      values[i, s, lane, 2 r + h] = compressed[16 i + g + 8 (r % 2), 16 s + 2 t + 8 (r // 2) + h]

  Elements 2 r and 2 r + 1 (the low half first) are register r of the operand A of mma.sp.
- ``meta``, int16 [rows / 16, cols / 64, 32, 2]: with u for columns 64 u .. 64 u + 63, and word w of a row of the
  compressed metadata for columns 16 w .. 16 w + 15:

      meta[i, u, lane, p] = words[16 i + g + 8 p, 4 u + t]

  As one int32, bits 4 q .. 4 q + 3 are the group of four columns 64 u + 16 t + 4 q of row 16 i + g, and bits
  16 + 4 q .. the same of row 16 i + g + 8: two bits are the place of the first kept weight, the next two of the second.
  Lanes with t = 0, 1 hold the metadata of tile s = 2 u and lanes with t = 2, 3 that of 2 u + 1, which mma.sp's sparsity
  selector tells apart; so all lanes load one word for two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.launch import by_kernel, launch, target
from trisparse.kernels.linear import linear_backward
from trisparse.kernels.operation import Operation
from trisparse.kernels.tuned import bucket, tuned

DTYPES = (torch.bfloat16, torch.float16)
MAX_RANK = 128
CHUNK = 1 << 21  # weights that the CPU route holds dense at a time
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148}  # of the largest GPU of each architecture

Lora = tuple[Tensor, Tensor, float]


def pack24(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The packed form of a 2:4 weight, as the module's docstring gives it.

    Args:
        values: bf16 or fp16 [rows, cols / 2], the kept weights in row order.
        meta: int16 [rows, cols / 16] of the same device, the places of the kept weights (kernels/nm.py).

    Returns:
        (values, meta) in fragment order, new tensors.

    Raises:
        ValueError: a wrong dtype, shape or device, rows that are not a multiple of 16, columns that are not one of 64,
            or metadata in which the two places of a group do not ascend (mma.sp has no meaning for it).
    """
    if values.dtype not in DTYPES:
        raise ValueError(f"values is {values.dtype}; the sparse tensor cores are used in bf16 and fp16")
    if values.dim() != 2 or values.shape[0] % 16 or values.shape[1] % 32 or not values.numel():
        raise ValueError(
            f"values is {list(values.shape)}; it must be [rows, cols / 2] with rows a multiple of 16 and cols of 64"
        )
    rows, cols = values.shape[0], 2 * values.shape[1]
    if rows * cols >= 2**33:
        raise ValueError(f"values is {list(values.shape)}; rows * cols must be below 2^33")
    if meta.dtype != torch.int16 or meta.shape != (rows, cols // 16):
        raise ValueError(f"meta is {meta.dtype} {list(meta.shape)}; it must be int16 [{rows}, {cols // 16}]")
    if meta.device != values.device:
        raise ValueError(f"meta is on {meta.device}, values on {values.device}")
    first, second = meta & 0x3333, meta >> 2 & 0x3333
    # Place by place, second - first + 3 is 4..6 where they ascend: bit 2 of each four is set, and nothing carries over.
    if bool(((second + 0x3333 - first) & 0x4444 != 0x4444).any()):
        raise ValueError("meta has a group whose two places do not ascend")
    tiles = values.reshape(rows // 16, 2, 8, cols // 32, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    words = meta.reshape(rows // 16, 2, 8, cols // 64, 4).permute(0, 3, 2, 4, 1)
    return (
        tiles.reshape(rows // 16, cols // 32, 32, 8).clone(memory_format=torch.contiguous_format),
        words.reshape(rows // 16, cols // 64, 32, 2).clone(memory_format=torch.contiguous_format),
    )


def unpack24(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack24`: (values [rows, cols / 2], meta int16 [rows, cols / 16]).

    Raises:
        ValueError: values or meta is not of the packed form.
    """
    rows, cols = _check_packed(values, meta)
    tiles = values.reshape(rows // 16, cols // 32, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    words = meta.reshape(rows // 16, cols // 64, 8, 4, 2).permute(0, 4, 2, 1, 3)
    return tiles.reshape(rows, cols // 2), words.reshape(rows, cols // 16)


def dense24(values: Tensor, meta: Tensor) -> Tensor:
    """W [rows, cols] of a packed weight, its pruned weights +0; ValueError as `unpack24`."""
    kept, words = unpack24(values, meta)
    rows, half = kept.shape
    shifts = torch.arange(0, 16, 2, device=meta.device, dtype=torch.int16)
    places = (words[..., None] >> shifts & 3).reshape(rows, half // 2, 2)
    dense = kept.new_zeros(rows, half // 2, 4).scatter_(2, places.long(), kept.reshape(rows, half // 2, 2))
    return dense.reshape(rows, 2 * half)


def linear24_ref(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, lora: Lora | None = None
) -> Tensor:
    """The specification of `linear24`: the formula in fp64, rounded once."""
    y = x.double() @ dense24(values, meta).double().T
    if bias is not None:
        y = y + bias.double()
    if lora is not None:
        y = y + lora[2] * (x.double() @ lora[0].double().T) @ lora[1].double().T
    return y.to(x.dtype)


def linear24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, lora: Lora | None = None) -> Tensor:
    """y = x W^T + bias + scale (x A^T) B^T for a packed 2:4 weight, in one kernel on sparse tensor cores.

    The same inputs give the same bits: partial sums are added up in a fixed order. On the CPU, W is made dense a few
    rows at a time. Differentiable in x, bias, A and B: dx takes W back into row order (its compressed bytes once more)
    and is what `linear` of kernels/linear.py has, since the transpose of a 2:4 weight is not 2:4.

    Args:
        x: [..., cols] of the dtype of values, any number of tokens.
        values, meta: of `pack24`.
        bias: [rows] of that dtype, or None.
        lora: (A [rank, cols], B [rows, rank], scale), rank 1 to 128, of that dtype, or None.

    Returns:
        y, [..., rows] of that dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or a GPU without sparse tensor cores (before sm_80).
    """
    rows, cols = _check_packed(values, meta)
    if x.dim() < 1 or x.shape[-1] != cols:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must be {cols}, the columns of the weight")
    shapes: dict[str, tuple[Tensor, list[int] | None]] = {"x": (x, None)}
    if bias is not None:
        shapes["bias"] = bias, [rows]
    if lora is not None:
        rank = lora[0].shape[0] if lora[0].dim() else 0
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"lora has rank {rank}; it must be in 1..{MAX_RANK}")
        shapes |= {"lora's A": (lora[0], [rank, cols]), "lora's B": (lora[1], [rows, rank])}
    for name, (tensor, shape) in shapes.items():
        if shape is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be {shape}")
        if tensor.dtype != values.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, values {values.dtype}; they must be the same")
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values on {values.device}")
    a, b, scale = lora or (None, None, 1.0)
    return _LINEAR24(x, values, meta, bias, a, b, float(scale))


def _check_packed(values: Tensor, meta: Tensor) -> tuple[int, int]:
    """(rows, cols) of a packed weight."""
    tiled = values.dim() == 4 and values.shape[2:] == (32, 8) and values.shape[1] % 2 == 0 and values.numel() > 0
    if values.dtype not in DTYPES or not tiled:
        raise ValueError(
            f"values is {values.dtype} {list(values.shape)}; pack24 gives bf16 or fp16 [rows / 16, cols / 32, 32, 8] "
            "with cols a multiple of 64"
        )
    expected = (values.shape[0], values.shape[1] // 2, 32, 2)
    if meta.dtype != torch.int16 or meta.shape != expected:
        raise ValueError(f"meta is {meta.dtype} {list(meta.shape)}; pack24 gives int16 {list(expected)} here")
    if meta.device != values.device:
        raise ValueError(f"meta is on {meta.device}, values on {values.device}")
    return 16 * values.shape[0], 32 * values.shape[1]


def _run(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    if by_kernel(x):
        return _by_kernel(x, values, meta, bias, a, b, scale)
    y = _fake(x, values, meta, bias, a, b, scale)
    with torch.autocast(x.device.type, enabled=False):
        low_rank = None if a is None or b is None else F.linear(x, a)
        step = max(CHUNK // (512 * values.shape[1]), 1)
        for tile in range(0, values.shape[0], step):
            weight = dense24(values[tile : tile + step], meta[tile : tile + step])
            part = slice(16 * tile, 16 * tile + weight.shape[0])
            y[..., part] = F.linear(x, weight, None if bias is None else bias[part])
            if low_rank is not None and b is not None:
                y[..., part] += scale * F.linear(low_rank, b[part])
    return y


def _fake(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    return x.new_empty(*x.shape[:-1], 16 * values.shape[0])


_LINEAR24 = Operation("linear24", _run, _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, _, a, b, ctx.scale = inputs
    keeps_x = a is not None and (a.requires_grad or b.requires_grad)
    ctx.save_for_backward(x if keeps_x else None, values, meta, a, b)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, meta, a, b = ctx.saved_tensors
    dx = dbias = da = db = dy_b = None
    dy_rows = dy.reshape(-1, dy.shape[-1])
    if ctx.needs_input_grad[0]:
        kept, words = unpack24(values, meta)
        weight = CompressedWeight("2:4", (dy.shape[-1], 2 * kept.shape[1]), 2, 4, kept, words)
        lora = None if a is None else (a, b, ctx.scale)
        dx, dy_b = linear_backward(dy_rows, weight, lora)
        dx = dx.reshape(*dy.shape[:-1], weight.shape[1])
    if ctx.needs_input_grad[3]:
        dbias = dy_rows.sum(0)
    if ctx.needs_input_grad[4]:
        dy_b = dy_rows @ b if dy_b is None else dy_b
        da = (dy_b.T @ x.reshape(-1, x.shape[-1])) * ctx.scale
    if ctx.needs_input_grad[5]:
        db = (dy_rows.T @ (x.reshape(-1, x.shape[-1]) @ a.T)) * ctx.scale
    return dx, None, None, dbias, da, db, None


_LINEAR24.register_autograd(_backward, _save)


@dataclass(frozen=True)
class Config:
    """How a product is cut: a CTA has a tile of W's rows and of tokens, and warps along k, the rows and the tokens."""

    rows: int
    tokens: int
    k_warps: int
    row_warps: int
    token_warps: int
    splits: int  # CTAs that share a tile along k, and write fp32 sums that a second kernel adds up
    stages: int  # tiles of x in shared memory

    @property
    def num_warps(self) -> int:
        """Warps of a CTA."""
        return self.k_warps * self.row_warps * self.token_warps


# (rows, tokens, row warps, token warps) that fit 255 registers, by the padded rank.
_TILES = {
    0: [(256, 128, 4, 2), (256, 64, 4, 1), (128, 64, 2, 2)],
    16: [(256, 64, 4, 1), (128, 64, 2, 2)],
    32: [(256, 32, 4, 1), (128, 64, 2, 2)],
    64: [(256, 32, 4, 1), (128, 64, 2, 2)],
    128: [(256, 32, 8, 1), (128, 64, 4, 2)],
}


def config(rows: int, cols: int, tokens: int, rank: int, cc: int) -> Config:
    """The tiles for W [rows, cols], `tokens` of x and LoRA of `rank` (0 for none) on compute capability `cc`.

    Up to 64 tokens the weight's bytes bind. A CTA streams few rows and all tokens, its warps share k, and there should
    be two CTAs for each SM: from narrow tiles where x is small, then by splitting k, as long as a split has four stages
    and the partial sums (which stay in the L2 cache) have at most a quarter of W's bytes. The sum x A^T takes
    rank * tokens / 32 registers a thread, hence fewer tokens a CTA at high rank.

    Beyond, the pipes bind. The candidates are the tiles that fit 255 registers at that rank; taken is the least of
    (CTAs of the busiest SM) * (clocks a step of 32 columns takes the slowest pipe of an SM).
    """
    padded = _padded_rank(rank)
    sms = SMS.get(cc, 108)
    if tokens <= 64:
        tile = min(max(_power_of_two(tokens), 8), 1024 // max(padded, 16))
        tiles = -(-tokens // tile)
        narrow = not rank and tile <= 16 and rows // 32 * tiles < 2 * sms
        tile_rows = 16 if narrow else 32
        k_warps = 4 if padded <= 32 else 2  # A of a high rank takes the shared memory of so many columns
        ctas = -(-rows // tile_rows) * tiles
        stages_of_k = -(-cols // (64 * k_warps))
        splits = min(2 * sms // max(ctas, 1), stages_of_k // 4, cols // (28 * max(tokens, 1)))
        return Config(tile_rows, tile, k_warps, 1, 1, max(splits, 1), 3 if tile <= 16 and padded <= 16 else 2)

    def cost(tile: tuple[int, int, int, int]) -> float:
        tile_rows, tile_tokens, row_warps, token_warps = tile
        # Clocks of a step of 32 columns on sm_80. Sparse tensor cores do 2048 multiply-adds of the dense product a
        # clock. 128 bytes a clock pass through shared memory and L1: x written and read by each row warp, W (36 bytes a
        # row with its metadata) read by each token warp. 47 bytes a clock and SM come from L2.
        tensor = tile_tokens * (tile_rows + 2 * padded) / 64
        shared = (tile_tokens * (row_warps + 1) * 64 + tile_rows * token_warps * 36) / 128
        l2 = (tile_tokens * 64 + tile_rows * 36) / 47
        ctas = -(-rows // tile_rows) * -(-tokens // tile_tokens)
        return -(-ctas // sms) * max(tensor, shared, l2)

    tile_rows, tile_tokens, row_warps, token_warps = min(_TILES[padded], key=cost)
    return Config(tile_rows, tile_tokens, 1, row_warps, token_warps, 1, 2)


def key(rows: int, cols: int, dtype: torch.dtype, tokens: int, rank: int) -> str:
    """What a measured configuration is filed under."""
    return f"{rows}x{cols} {str(dtype).removeprefix('torch.')} {bucket(tokens)} tokens rank {rank}"


def alternatives(rows: int, cols: int, tokens: int, rank: int, cc: int) -> list[Config]:
    """Configurations to measure against each other; the first is `config`'s. Some may not fit a device."""
    first, padded = config(rows, cols, tokens, rank, cc), _padded_rank(rank)
    found = {first} | {Config(r, t, 1, rw, tw, 1, stages) for r, t, rw, tw in _TILES[padded] for stages in (2, 3)}
    if tokens <= 64:
        for tile_rows in (16, 32):
            for splits in {1, 2, 4, first.splits}:
                found |= {replace(first, rows=tile_rows, splits=splits, stages=stages) for stages in (2, 3)}
    return sorted(found, key=lambda one: one != first)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _padded_rank(rank: int) -> int:
    """Rows of A in a CTA: tiles of 16, a power of two of them."""
    return max(_power_of_two(rank), 16) if rank else 0


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and from an address that 16-byte copies can start at."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _by_kernel(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    # Triton is there on Linux only
    from trisparse.kernels.linear24_gluon import add_splits_kernel, linear24_kernel

    cc = target(x)
    if cc < 80:
        raise ValueError(f"x is on a GPU of compute capability {cc / 10}; sparse tensor cores need 8.0")
    y = _fake(x, values, meta, bias, a, b, scale)
    rows, cols = y.shape[-1], x.shape[-1]
    tokens = x.numel() // cols
    if not tokens:
        return y
    rank = 0 if a is None else a.shape[0]
    found = tuned(x, "linear24", key(rows, cols, x.dtype, tokens, rank))
    c = config(rows, cols, tokens, rank, cc) if found is None else Config(**found)
    partial = y if c.splits == 1 else y.new_empty(c.splits, tokens, rows, dtype=torch.float32)
    x = _aligned(x)
    launch(
        linear24_kernel,
        (-(-tokens // c.tokens), -(-rows // c.rows), c.splits),
        _aligned(values).view(torch.int32),
        _aligned(meta).view(torch.int32),
        x,
        x if bias is None else _aligned(bias),
        x if a is None else _aligned(a),
        x if b is None else _aligned(b),
        partial,
        tokens,
        rows,
        cols,
        rank,
        scale,
        num_warps=c.num_warps,
        ROWS=c.rows,
        TOKENS=c.tokens,
        RANK=_padded_rank(rank),
        K_WARPS=c.k_warps,
        ROW_WARPS=c.row_warps,
        TOKEN_WARPS=c.token_warps,
        SPLITS=c.splits,
        STAGES=c.stages,
        HAS_BIAS=bias is not None,
        TAIL=cols % (64 * c.k_warps) != 0,
    )
    if c.splits > 1:
        launch(
            add_splits_kernel,
            (-(-y.numel() // 1024),),
            partial,
            y if bias is None else _aligned(bias),
            y,
            y.numel(),
            rows,
            num_warps=4,
            SPLITS=c.splits,
            HAS_BIAS=bias is not None,
            BLOCK=1024,
        )
    return y
