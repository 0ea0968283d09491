"""Follow the storages of tensors from their birth to their end; knows nothing of models.

It needs private names of PyTorch, and is therefore imported where it is used: where one of them is gone, there is no
estimate of memory, and training goes on.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of the tensors that are made inside.

    Args:
        ignored: tensors that are there already, and do not count.

    Attributes:
        now: bytes of those that live.
        most: the largest that ``now`` has been.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in ignored:
            self._follow(tensor.untyped_storage())
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def end(_: weakref.ref) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, end)
        self.now += size
        self.most = max(self.most, self.now)
