"""The part of vLLM 0.33 that trisparse.vllm_layers meets, for tests without vLLM: the same names, signatures and calls.

Written from vllm/model_executor: layers/linear.py, layers/quantization/{__init__,base_config}.py, models/llama.py,
models/utils.py and model_loader/utils.py. ``install(monkeypatch)`` puts it in vLLM's place and gives the state of the
process: ``rank`` and ``ranks`` of tensor parallelism and ``additional_config``.
"""

import inspect
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        weight = nn.Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype))
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
        return None

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    @staticmethod
    def get_checkpoint_weight_mapper():
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        return


class WeightsMapper:
    """Renames; a prefix that maps to None leaves the weight out. A stacked name gives the tensor its shard_id."""

    def __init__(self, orig_to_new_stacked=None, orig_to_new_prefix=None):
        self.stacked, self.prefix = orig_to_new_stacked or {}, orig_to_new_prefix or {}

    def __or__(self, other):
        return WeightsMapper({**self.stacked, **other.stacked}, {**self.prefix, **other.prefix})

    def named(self, name):
        shard = None
        for part, (new, number) in self.stacked.items():
            if part in name:
                name, shard = name.replace(part, new, 1), number
        for prefix, new in self.prefix.items():
            if name.startswith(prefix):
                name = None if new is None else name.replace(prefix, new, 1)
        return name, shard

    def apply(self, weights):
        for name, tensor in weights:
            new, shard = self.named(name)
            if new is not None:
                if shard is not None:
                    tensor.shard_id = shard
                yield new, tensor

    def apply_dict(self, values):
        return {new: value for name, value in values.items() if (new := self.named(name)[0]) is not None}


def set_weight_attrs(weight, weight_attrs):
    for key, value in (weight_attrs or {}).items():
        assert not hasattr(weight, key), key
        setattr(weight, key, value)


class LinearBase(nn.Module):
    state = SimpleNamespace(rank=0, ranks=1, additional_config={})

    def __init__(self, input_size, output_size, bias, quant_config, prefix, output_sizes=None, split=None):
        super().__init__()
        self.tp_rank, self.tp_size = self.state.rank, self.state.ranks
        self.input_size, self.output_size = input_size, output_size
        self.prefix, self.params_dtype = prefix, torch.get_default_dtype()
        self.quant_config = quant_config
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        cuts = {"rows": (1, self.tp_size), "cols": (self.tp_size, 1), None: (1, 1)}[split]
        self.input_size_per_partition = input_size // cuts[0]
        self.output_partition_sizes = [size // cuts[1] for size in output_sizes or [output_size]]
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=self.input_size_per_partition,
            output_partition_sizes=self.output_partition_sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(self.output_partition_sizes)))
            set_weight_attrs(self.bias, {"output_dim": 0, "weight_loader": self.weight_loader})
        else:
            self.register_parameter("bias", None)

    def start(self, held, shard):
        return self.tp_rank * held

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        if (dim := getattr(param, "input_dim", None)) is not None and loaded_weight.shape[dim] != param.shape[dim]:
            loaded_weight = loaded_weight.narrow(dim, self.tp_rank * param.shape[dim], param.shape[dim])
        sizes = self.output_partition_sizes
        index = {"q": 0, "k": 1, "v": 2}.get(loaded_shard_id, loaded_shard_id) or 0
        into = param.data.narrow(0, sum(sizes[:index]), sizes[index])
        if loaded_weight.shape[0] != sizes[index]:
            loaded_weight = loaded_weight.narrow(0, self.start(sizes[index], loaded_shard_id), sizes[index])
        into.copy_(loaded_weight)

    def forward(self, x):
        # Only rank 0 of a layer that is split by its inputs adds the bias.
        whole = self.input_size_per_partition == self.input_size
        return self.quant_method.apply(self, x, self.bias if whole or not self.tp_rank else None)


class ReplicatedLinear(LinearBase):
    pass


class ColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix="", output_sizes=None):
        super().__init__(input_size, output_size, bias, quant_config, prefix, output_sizes, split="rows")


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix=""):
        super().__init__(input_size, output_size, bias, quant_config, prefix, split="cols")


class _Fused(ColumnParallelLinear):
    def load_weights(self, weights):
        for name, loaded_weight in weights:
            shard_id = getattr(loaded_weight, "shard_id", None)
            param = getattr(self, name, self)
            param.weight_loader(param, loaded_weight, shard_id)
            yield name


class MergedColumnParallelLinear(_Fused):
    def __init__(self, input_size, output_sizes, bias=True, quant_config=None, prefix=""):
        super().__init__(input_size, sum(output_sizes), bias, quant_config, prefix, output_sizes)


class QKVParallelLinear(_Fused):
    def __init__(
        self,
        hidden_size,
        head_size,
        total_num_heads,
        total_num_kv_heads=None,
        bias=True,
        quant_config=None,
        prefix="",
    ):
        ranks = self.state.ranks
        self.replicas = max(1, ranks // total_num_kv_heads)
        kv = max(total_num_kv_heads, ranks) * head_size  # repeated heads count once for each device
        sizes = [total_num_heads * head_size, kv, kv]
        super().__init__(hidden_size, sum(sizes), bias, quant_config, prefix, sizes)

    def start(self, held, shard):
        return (self.tp_rank if shard == "q" else self.tp_rank // self.replicas) * held


class VocabParallelEmbedding(nn.Module):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class RoutedExperts(nn.Module):
    pass


def load_weights(model, weights, quant_config, stacked=None):
    """AutoWeightsLoader: to a child's load_weights or, one parameter at a time, to its weight_loader."""
    mapper = WeightsMapper(stacked) | quant_config.get_checkpoint_weight_mapper()
    for name, tensor in mapper.apply(weights):
        path, _, param = name.rpartition(".")
        module = model.get_submodule(path)
        if hasattr(module, "load_weights"):
            assert list(module.load_weights([(param, tensor)])) == [param]
            continue
        parameter = dict(module.named_parameters(recurse=False)).get(param)
        if parameter is None:
            raise ValueError(f"There is no module or parameter named {name!r}")
        assert parameter.dtype == tensor.dtype
        getattr(parameter, "weight_loader", lambda to, new: to.data.copy_(new))(parameter, tensor)


def process_weights_after_loading(model):
    for module in list(model.modules()):
        if isinstance(method := getattr(module, "quant_method", None), QuantizeMethodBase):
            method.process_weights_after_loading(module)


QUANTIZATION_METHODS = ["fp8", "gptq"]
REGISTERED = {}


def register_quantization_config(quantization):
    def register(quant_config_cls):
        assert issubclass(quant_config_cls, QuantizationConfig)
        QUANTIZATION_METHODS.append(quantization)
        REGISTERED[quantization] = quant_config_cls
        return quant_config_cls

    return register


_LAYERS = "vllm.model_executor.layers"
_HOMES = {
    f"{_LAYERS}.linear": (LinearBase, LinearMethodBase, UnquantizedLinearMethod),
    f"{_LAYERS}.quantization": (register_quantization_config,),
    f"{_LAYERS}.quantization.base_config": (QuantizationConfig, QuantizeMethodBase),
    f"{_LAYERS}.vocab_parallel_embedding": (VocabParallelEmbedding,),
    f"{_LAYERS}.fused_moe": (RoutedExperts,),
    "vllm.model_executor.models.utils": (WeightsMapper,),
    "vllm.model_executor.utils": (set_weight_attrs,),
    "vllm.config": (),
}


def install(monkeypatch):
    """Put these classes in place of vLLM's, register the plugin, and give (state, the registered config class)."""
    for home, values in _HOMES.items():
        module = ModuleType(home)
        for value in values:
            setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, home, module)
    state = LinearBase.state
    state.rank, state.ranks, state.additional_config = 0, 1, {}
    sys.modules["vllm.config"].get_current_vllm_config_or_none = lambda: state
    sys.modules[f"{_LAYERS}.quantization"].QUANTIZATION_METHODS = QUANTIZATION_METHODS
    monkeypatch.delitem(sys.modules, "trisparse.vllm_layers", raising=False)
    QUANTIZATION_METHODS[:] = ["fp8", "gptq"]
    from trisparse.vllm_plugin import register

    register()
    register()
    assert QUANTIZATION_METHODS == ["fp8", "gptq", "trisparse"]
    return state, REGISTERED["trisparse"]


def check_signatures(config, method):
    """The overridden methods take what vLLM's take, by the same names."""
    for ours, base in ((config, QuantizationConfig), (method, LinearMethodBase)):
        for name, theirs in vars(base).items():
            if name.startswith("_") or name not in vars(ours):
                continue
            function = getattr(theirs, "__func__", theirs)
            mine = getattr(vars(ours)[name], "__func__", vars(ours)[name])
            assert list(inspect.signature(mine).parameters) == list(inspect.signature(function).parameters), name
