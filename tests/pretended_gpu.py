"""A GPU that is none: tensors lie in host memory, each marked with the device that it would be on.

What a GPU would refuse is refused: an operation on tensors of two devices, and numpy on one that is not in host
memory. What only a GPU's driver, allocator or kernels do otherwise is not seen. It serves code that asks tensors and
modules for their device, and moves them by `to`, `cuda`, `cpu` or `device=`.
"""

import contextlib
import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
REAL_DEVICE = torch.Tensor.device.__get__
MEMORY = 80 * 2**30
LIKE = " ".join(f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint"))
FACTORIES = {
    torch: f"empty zeros ones full rand randn randint randperm arange linspace logspace eye tensor as_tensor "
    f"asarray empty_strided tril_indices triu_indices {LIKE}",
    torch.Tensor: "new_empty new_zeros new_ones new_full new_tensor",
}
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")  # each waits for the GPU
# Between devices; and what takes indices from anywhere.
CROSSING = {"copy_", "_to_copy", "set_", "resize_", "_copy_from_and_resize"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Places:
    """Which storages are on the GPU."""

    def __init__(self):
        # By address, which no other storage gets while something refers to it, if weakly.
        self.there = {}
        self.anywhere = {}  # made inside of torch, which knows where, but does not say so here

    @staticmethod
    def hold(tensor: torch.Tensor) -> bool:
        """Whether it has content, which lies somewhere."""
        if isinstance(tensor, FakeTensor) or tensor.is_meta or torch._C._functorch.is_batchedtensor(tensor):
            return False
        return tensor.layout == torch.strided

    def of(self, tensor: torch.Tensor) -> torch.device:
        if not self.hold(tensor):
            return REAL_DEVICE(tensor)
        return GPU if tensor.untyped_storage()._cdata in self.there else CPU

    def is_anywhere(self, tensor: torch.Tensor) -> bool:
        return self.hold(tensor) and tensor.untyped_storage()._cdata in self.anywhere

    def put(self, tensor: torch.Tensor, device: torch.device | None) -> None:
        """Mark a tensor's storage; None is anywhere."""
        if not self.hold(tensor):
            return
        storage = tensor.untyped_storage()
        self.there.pop(storage._cdata, None)
        self.anywhere.pop(storage._cdata, None)
        if device is None:
            self.anywhere[storage._cdata] = StorageWeakRef(storage)
        elif device.type == "cuda":
            self.there[storage._cdata] = StorageWeakRef(storage)


class Operations(TorchDispatchMode):
    """Refuses operations on tensors of two devices; what comes out of one is where its tensors are."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):  # the estimate's, which say where they are
            return func(*args, **kwargs)
        places = [self.places.of(tensor) for tensor in tensors]
        acting = [pair for pair in zip(tensors, places) if not self.places.is_anywhere(pair[0])]
        if name in INDEXING and places and places[0] == GPU:
            acting = acting[:1]
        whole = {place for tensor, place in acting if tensor.ndim}
        lone = {place for tensor, place in acting if not tensor.ndim}  # numbers, which a GPU also takes from the CPU
        if name not in CROSSING and (len(whole) > 1 or GPU in lone and whole == {CPU}):
            shapes = [(tuple(tensor.shape), str(place)) for tensor, place in zip(tensors, places)]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {shapes}")
        before = {tensor.untyped_storage()._cdata for tensor in tensors if self.places.hold(tensor)}
        output = func(*args, **kwargs)
        place = places[0] if name in CROSSING and places else GPU if GPU in whole | lone else CPU
        anywhere = not acting
        for leaf in tree_leaves(output) if name != "set_" else ():  # which takes a storage as it is
            held = isinstance(leaf, torch.Tensor) and self.places.hold(leaf)
            if held and leaf.untyped_storage()._cdata not in before:
                self.places.put(leaf, None if anywhere else place)
        return output


class Tensors:
    """What Python code asks of tensors and their devices, in the place of torch's own; `reads` is what waits for the
    GPU."""

    def __init__(self, places: Places):
        self.places, self.reads = places, []

    def patch(self, patch) -> None:
        for name in ("device", "is_cuda", "is_cpu", "get_device", "is_pinned"):
            patch.setattr(torch.Tensor, name, getattr(self, name)())
        for name in ("to", "cuda", "cpu"):
            patch.setattr(torch.Tensor, name, self.mover(name))
        for name in READS + ("numpy", "__array__", "pin_memory", "__deepcopy__"):
            patch.setattr(torch.Tensor, name, self.watched(name, getattr(torch.Tensor, name)))
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        for owner, names in FACTORIES.items():
            for name in names.split():
                patch.setattr(owner, name, self.factory(getattr(owner, name)))

    def device(self):
        return property(self.places.of)

    def is_cuda(self):
        return property(lambda tensor: self.places.of(tensor) == GPU)

    def is_cpu(self):
        return property(lambda tensor: self.places.of(tensor) == CPU)

    def get_device(self):
        return lambda tensor: 0 if self.places.of(tensor) == GPU else -1

    def is_pinned(self):
        return lambda tensor, device=None: self.places.of(tensor) == CPU

    def watched(self, name, method):
        @functools.wraps(method)
        def call(tensor, *args, **kwargs):
            if not self.places.hold(tensor):
                return method(tensor, *args, **kwargs)
            there = self.places.of(tensor) == GPU
            if name in ("numpy", "__array__") and there:
                raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to host memory first")
            if name == "pin_memory":
                if there:
                    raise RuntimeError("cannot pin a tensor that is on a GPU")
                return tensor.detach().clone()
            if name in READS and there:
                self.reads.append(name)
            output = method(tensor, *args, **kwargs)
            if name == "__deepcopy__":  # copies a storage, which no operation does
                self.places.put(output, GPU if there else output.device)
            return output

        return call

    def factory(self, function):
        @functools.wraps(function)
        def make(*args, device=None, **kwargs):
            if device is None:
                output = function(*args, **kwargs)
                self.places.put(output, args[0].device if args and isinstance(args[0], torch.Tensor) else CPU)
                return output
            device = GPU if isinstance(device, int) else torch.device(device)
            if device.type not in ("cuda", "cpu"):
                return function(*args, device=device, **kwargs)
            output = function(*args, device="cpu", **kwargs)
            if args and isinstance(args[0], torch.Tensor) and self.places.of(args[0]) != self.places.of(output):
                output = output.clone()
            self.places.put(output, device)
            return output

        return make

    def mover(self, name):
        to = torch.Tensor.to

        @functools.wraps(to)
        def move(tensor, *args, copy=False, memory_format=None, **kwargs):
            dtype, place = None, {"cuda": GPU, "cpu": CPU}.get(name)
            other = args[0] if args else kwargs.get("other")
            if isinstance(other, torch.Tensor):
                place, dtype = other.device, other.dtype
            elif name == "to":
                place, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            if tensor.is_meta or place is not None and place.type == "meta":
                return to(tensor, *args, copy=copy, **kwargs)
            if not self.places.hold(tensor):
                return tensor if dtype is None else to(tensor, dtype)
            stays_anywhere = place is None and self.places.is_anywhere(tensor)
            place = tensor.device if place is None else GPU if place.type == "cuda" else place
            output = tensor if dtype is None else to(tensor, dtype)
            shared = output.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            output = output.clone() if shared and (copy or place != tensor.device) else output
            self.places.put(output, None if stays_anywhere else place)
            return output

        return move


class Stream:
    """One that is always done."""

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        pass

    wait_stream = wait_event = record_event = lambda self, *args: None


@contextlib.contextmanager
def pretended_gpu(patch):
    """Let torch have a GPU inside; `patch` is a MonkeyPatch. Yields Tensors, for its `reads`."""
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, function in functions.items():
        patch.setattr(torch.cuda, name, function)
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"):
        patch.setattr(torch.accelerator, name, lambda device=None: 0)
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        patch.setattr(torch.accelerator, name, lambda device=None: None)
    torch.utils._device._device_constructors()  # remembered: `with torch.device("meta")` looks for torch's own
    places = Places()
    tensors = Tensors(places)
    tensors.patch(patch)
    with Operations(places):
        yield tensors
