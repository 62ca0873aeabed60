"""Groups that are not slices of a tensor, or that span several tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._checks import FLOATING_DTYPES, accumulate_dtype, check_tensor
from fusee.prox.group_pieces import (
    INTEGER_DTYPES,
    Piece,
    check_indices,
    check_piece,
    empty_ids,
)
from fusee.prox.group_sums import spread_to_elements, sum_of_groups


class GroupTable:
    r"""Says of every element of some tensors to which group it belongs, if to any.

    It is for groups that are not the slices along a dimension, or whose parts lie in several tensors:
    what has to vanish together so that a unit can be cut out of a network, such as a filter with its
    bias, its batch normalisation and the slice of the next layer that reads it. Given as ``groups`` to
    :func:`fusee.prox_group_envelope` and its relatives, their ``input`` is a sequence of tensors, of the
    shapes and in the order of the table. Elements in no group are passed through.

    A table may be made from the number of the group of each element, as here, from lists of slices
    (:meth:`from_slices`), or for what networks are made of (:meth:`units`, :meth:`attention_heads`,
    :meth:`hidden_units`, :meth:`filters`, :meth:`blocks`).

    Args:
        ids: for each tensor an integer tensor of its shape: the number of each element's group, counted
            from 0, or -1 for elements in none. All on one device; they are copied.
        groups: how many groups there are. Default: one more than the largest number.

    Attributes:
        ids: the numbers, as int64 tensors.
        groups: how many groups there are; also ``len(table)``.
        sizes: how many elements each group has, an int64 tensor.

    Raises:
        TypeError: an ``ids`` is not a tensor of integers, or ``groups`` is not an int.
        ValueError: a number is less than -1 or not less than ``groups``, a group has no elements, the
            tensors are on several devices, or there are none.

    An element has one number, so groups do not overlap; the constructors that take slices raise where
    they would. Tables can be pickled and copied. To hold the numbers of a table, 8 bytes an element are
    needed, and up to 16 more from the first use on, which waits for the device.

    Example:
        >>> import torch, fusee
        >>> weight, bias = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([4.0, 0.0])
        >>> table = fusee.GroupTable([torch.tensor([[0, 0], [1, 1]]), torch.tensor([0, 1])])
        >>> table
        GroupTable(groups=2, shapes=[(2, 2), (2,)])
        >>> table.norms([weight, bias])
        tensor([5., 1.], dtype=torch.float64)
    """

    def __init__(self, ids: Sequence[Tensor], groups: int | None = None) -> None:
        if isinstance(ids, Tensor) or not isinstance(ids, Sequence):
            raise TypeError(f"ids must be a sequence of tensors, got {type(ids).__name__}")
        if not ids:
            raise ValueError("ids must have at least one tensor")
        for number, tensor in enumerate(ids):
            check_tensor(f"ids[{number}]", tensor)
            if tensor.dtype not in INTEGER_DTYPES:
                raise TypeError(f"ids[{number}] must be of integers, got {tensor.dtype}")
            if tensor.device != ids[0].device:
                raise ValueError(
                    f"ids must be on one device, got {ids[0].device} and {tensor.device}"
                )
        if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int)):
            raise TypeError(f"groups must be an int, got {type(groups).__name__}")
        self.ids = tuple(
            t.detach().to(torch.int64, copy=True, memory_format=torch.contiguous_format)
            for t in ids
        )
        flat = torch.cat([t.reshape(-1) for t in self.ids])
        least, most = (int(x) for x in flat.aminmax()) if flat.numel() else (-1, -1)
        if least < -1:
            raise ValueError(f"ids must not be less than -1, got {least}")
        self.groups: int = most + 1 if groups is None else groups
        if most >= self.groups:
            raise ValueError(f"ids must be less than the {self.groups} groups, got {most}")
        self.sizes = torch.bincount(flat + 1, minlength=self.groups + 1)[1:]
        empty = (self.sizes == 0).nonzero()
        if empty.numel():
            raise ValueError(f"groups must not be empty, got no elements of group {int(empty[0])}")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors."""
        return [tuple(t.shape) for t in self.ids]

    @property
    def device(self) -> torch.device:
        """Where the numbers are, and the tensors must be."""
        return self.sizes.device

    def __len__(self) -> int:
        return self.groups

    def __repr__(self) -> str:
        return f"GroupTable(groups={self.groups}, shapes={self.shapes})"

    def to(self, device: torch.device | str) -> GroupTable:
        """The same table on another device, itself if it is there."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = object.__new__(GroupTable)
        moved.ids = tuple(t.to(device) for t in self.ids)
        moved.groups = self.groups
        moved.sizes = self.sizes.to(device)
        return moved

    @classmethod
    def from_slices(
        cls, tensors: Sequence[Tensor], groups: Iterable[Iterable[Piece]]
    ) -> GroupTable:
        """A table of groups that are each a list of slices.

        Args:
            tensors: the tensors, of which only shapes and device matter.
            groups: for every group its pieces ``(tensor, dim, indices)``: the number of a tensor, a
                dimension, and which slices along it: an int, a slice, or ints in a sequence or tensor,
                all from 0. The indices None are all of them; the dimension None, with the indices None,
                is the whole tensor.

        Raises:
            TypeError: a piece is not such a triple.
            IndexError: there is no such tensor, dimension or index.
            ValueError: an element is in two groups or twice in one, or a group has no elements.

        Example:
            >>> import torch, fusee
            >>> first, second = torch.ones(2, 3), torch.ones(3, 2)
            >>> groups = [[(0, 0, 0), (1, 1, 0)], [(0, 0, 1)]]
            >>> fusee.GroupTable.from_slices([first, second], groups).ids[1]
            tensor([[ 0, -1],
                    [ 0, -1],
                    [ 0, -1]])
        """
        ids = empty_ids(tensors)
        count = 0
        for group, pieces in enumerate(groups):
            count += 1
            for piece in pieces:
                number, dim, indices = check_piece(piece, ids)
                whole = (
                    ids[number].view(-1) if dim is None or not ids[number].dim() else ids[number]
                )
                chosen = check_indices(indices, whole.shape[dim or 0], whole.device)
                if chosen.unique().numel() != chosen.numel():
                    raise ValueError(
                        f"groups must not repeat an element: group {group} has an index of "
                        f"tensor {number} twice"
                    )
                taken = whole.index_select(dim or 0, chosen).reshape(-1)
                taken = taken[taken >= 0]
                if taken.numel():
                    raise ValueError(
                        f"groups must not overlap: an element of tensor {number} is in the groups "
                        f"{int(taken[0])} and {group}"
                    )
                whole.index_fill_(dim or 0, chosen, group)
        return cls(ids, count)

    @classmethod
    def units(cls, rows: Sequence[Tensor], columns: Sequence[Tensor], units: int) -> GroupTable:
        """A table of units that own rows of some tensors and columns of others.

        Each tensor is divided evenly: with 4 units, the unit 0 owns the first quarter of the dimension
        0 of the ``rows`` and of the dimension 1 of the ``columns``, and so on.

        Args:
            rows: the tensors that make the units, such as weights and biases.
            columns: the weights that read them. A linear layer behind a flattened convolution has
                several columns for each channel, in order.
            units: how many there are.

        Returns:
            A table of the tensors ``[*rows, *columns]``.

        Raises:
            TypeError: ``units`` is not an int.
            ValueError: ``units`` is not positive, or does not divide a dimension.

        Example:
            >>> import torch, fusee
            >>> fusee.GroupTable.units([torch.ones(4, 2)], [torch.ones(1, 2)], 2).ids[1]
            tensor([[0, 1]])
        """
        if isinstance(units, bool) or not isinstance(units, int):
            raise TypeError(f"units must be an int, got {type(units).__name__}")
        if units < 1:
            raise ValueError(f"units must be positive, got {units}")
        ids = empty_ids([*rows, *columns])
        for number, numbers in enumerate(ids):
            dim = 0 if number < len(rows) else 1
            if numbers.dim() <= dim or numbers.shape[dim] % units or not numbers.shape[dim]:
                raise ValueError(
                    f"units must divide dimension {dim} of tensor {number}, got {units} units and shape "
                    f"{tuple(numbers.shape)}"
                )
            extent = numbers.shape[dim]
            along = torch.arange(extent, device=numbers.device) // (extent // units)
            numbers.copy_(along.reshape(-1, *(1,) * (numbers.dim() - dim - 1)))
        return cls(ids, units)

    @classmethod
    def attention_heads(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        heads: int,
        *,
        biases: Sequence[Tensor] = (),
    ) -> GroupTable:
        """A table of attention heads: rows of the projections to queries, keys and values, with their
        ``biases``, and columns of the one after.

        The output's own bias belongs to no head. Where several heads share keys and values, only whole
        heads of keys can be cut: ``heads`` is then their number, and a group has all their queries.

        Returns:
            A table of the tensors ``[query, key, value, *biases, output]``.

        Example:
            >>> import torch, fusee
            >>> q, k, v, out = (torch.ones(8, 8) for _ in range(4))
            >>> fusee.GroupTable.attention_heads(q, k, v, out, 4).sizes
            tensor([64, 64, 64, 64])
        """
        return cls.units([query, key, value, *biases], [output], heads)

    @classmethod
    def hidden_units(
        cls, first: Tensor, second: Tensor, *, rows: Sequence[Tensor] = ()
    ) -> GroupTable:
        """A table of the hidden units of a perceptron: rows of the ``first`` weight and of what
        goes with it, its bias and those of a gate, and columns of the ``second``.

        Returns:
            A table of the tensors ``[first, *rows, second]``.

        Example:
            >>> import torch, fusee
            >>> table = fusee.GroupTable.hidden_units(torch.ones(6, 3), torch.ones(2, 6))
            >>> len(table), table.sizes[0].item()
            (6, 5)
        """
        return cls.units([first, *rows], [second], first.shape[0] if first.dim() else 0)

    @classmethod
    def filters(
        cls, weight: Tensor, *, rows: Sequence[Tensor] = (), consumers: Sequence[Tensor] = ()
    ) -> GroupTable:
        """A table of the filters of a convolution: rows of its ``weight`` and of what goes with it, the
        bias and the scale and shift of a batch normalisation (or the weight of a depthwise convolution
        behind it), and the columns of the weights of its ``consumers``.

        Returns:
            A table of the tensors ``[weight, *rows, *consumers]``.

        Example:
            >>> import torch, fusee
            >>> conv, following = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3)
            >>> table = fusee.GroupTable.filters(
            ...     conv.weight, rows=[conv.bias], consumers=[following.weight]
            ... )
            >>> len(table), table.sizes[0].item()
            (8, 64)
        """
        return cls.units([weight, *rows], consumers, weight.shape[0] if weight.dim() else 0)

    @classmethod
    def blocks(cls, tensor: Tensor, shape: Sequence[int]) -> GroupTable:
        """A table of the blocks of one tensor, such as the 4 x 4 blocks of a matrix.

        Args:
            tensor: the tensor.
            shape: the extents of a block in the last dimensions; ``(4,)`` makes groups of 4 neighbours
                in a row. In the other dimensions a block has one element. The last blocks are smaller
                where the extent does not divide.

        Raises:
            ValueError: ``shape`` has more dimensions than the tensor, or an extent that is not positive.

        The pattern N:M is not a matter of groups: it keeps N single elements of each block of M, which
        is ``fusee.project_top_k_groups`` of each, by ``torch.vmap`` over ``tensor.reshape(-1, M)``.

        Example:
            >>> import torch, fusee
            >>> fusee.GroupTable.blocks(torch.ones(2, 6), (2, 3)).ids[0]
            tensor([[0, 0, 0, 1, 1, 1],
                    [0, 0, 0, 1, 1, 1]])
        """
        check_tensor("tensor", tensor)
        extents = tuple(shape)
        if len(extents) > tensor.dim() or any(e < 1 for e in extents):
            raise ValueError(
                f"shape must be of positive extents of at most {tensor.dim()} dimensions, got {extents}"
            )
        extents = (1,) * (tensor.dim() - len(extents)) + extents
        ids = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
        for dim, (extent, block) in enumerate(zip(tensor.shape, extents, strict=True)):
            along = torch.arange(extent, device=tensor.device) // block
            trailing = (1,) * (tensor.dim() - dim - 1)
            ids = ids * math.ceil(extent / block) + along.reshape(-1, *trailing)
        return cls([ids])

    def check(self, name: str, tensors: Any) -> list[Tensor]:
        """The tensors as a list; TypeError or ValueError, with their name, unless they fit the table."""
        if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
            kind = type(tensors).__name__
            raise TypeError(
                f"{name} must be a sequence of tensors, as groups is a table, got {kind}"
            )
        listed = list(tensors)
        for number, tensor in enumerate(listed):
            check_tensor(f"{name}[{number}]", tensor)
            if tensor.dtype not in FLOATING_DTYPES:
                raise TypeError(
                    f"{name}[{number}] must have dtype float32, float64, bfloat16 or float16, got "
                    f"{tensor.dtype}"
                )
        shapes = [tuple(t.shape) for t in listed]
        if shapes != self.shapes:
            raise ValueError(f"{name} must have the shapes {self.shapes} of groups, got {shapes}")
        for number, tensor in enumerate(listed):
            if tensor.device != self.device:
                raise ValueError(
                    f"{name}[{number}] must be on the same device as groups, got {tensor.device} and "
                    f"{self.device}"
                )
        return listed

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Euclidean norms of the groups, one number a group, in float64 (float32 on devices
        without it); differentiable, with derivative zero where a norm is zero.

        On the CPU and on CUDA squares and gradients are added in one order, that of the elements; in
        compiled code on CUDA only under ``torch.use_deterministic_algorithms``.
        """
        # There are devices without float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        squares = torch.zeros(self.groups, dtype=dtype, device=self.device)
        listed = self.check("tensors", tensors)
        for key, (tensor, ids) in enumerate(zip(listed, self.ids, strict=True)):
            terms = tensor.to(dtype).square().reshape(-1)
            squares = squares + sum_of_groups(self, key, ids, terms)
        positive = squares != 0
        return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)

    def scale(self, tensors: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, ...]:
        """The tensors with the elements of each group multiplied by its number among the ``scales``, in
        float32 or float64 and rounded once; elements in no group keep their bits."""
        listed = self.check("tensors", tensors)
        if scales.shape != (self.groups,):
            raise ValueError(f"scales must have shape ({self.groups},), got {tuple(scales.shape)}")
        scaled = []
        for key, (tensor, ids) in enumerate(zip(listed, self.ids, strict=True)):
            dtype = accumulate_dtype(tensor.dtype)
            each = spread_to_elements(self, key, ids, scales.to(dtype)).reshape(tensor.shape)
            # What is in no group keeps the bits of a NaN too.
            result = torch.where(ids < 0, tensor, (tensor.to(dtype) * each).to(tensor.dtype))
            scaled.append(result)
        return tuple(scaled)
