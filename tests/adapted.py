"""Models with adapters: LoRA linears of the example, and small models of Transformers as ``peft`` adapts them."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samkern.lora import adapted_weights

from .lists import FP64, seeded
from .recipes import ROOT


def _example() -> Any:
    """examples/lora.py as a module, so that what it defines can be pickled."""
    spec = importlib.util.spec_from_file_location("lora_example", ROOT / "examples" / "lora.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lora_example"] = module
    spec.loader.exec_module(module)
    return module


LoRALinear = _example().LoRALinear
VOCABULARY = 24


def own(dtype: torch.dtype = FP64, sizes: tuple[int, ...] = (6, 10, 8, 4), seed: int = 0) -> nn.Sequential:
    """Layers of different sizes, with a trained norm between, and factors that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for d_in, d_out in itertools.pairwise(sizes):
            layers += [LoRALinear(nn.Linear(d_in, d_out), rank=2), nn.LayerNorm(d_out), nn.Tanh()]
        return started(nn.Sequential(*layers[:-1]).to(dtype))


def language_model(kind: str, dtype: torch.dtype = FP64, seed: int = 0, **config: Any) -> Any:
    """A tiny "gpt2" (whose linear layers are Conv1D) or "llama", with random weights, adapted by ``peft``."""
    import peft

    return started(peft.get_peft_model(bare(kind, dtype, seed), lora_config(kind, **config)))


def bare(kind: str, dtype: torch.dtype = FP64, seed: int = 0) -> Any:
    """The same without adapters."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 8}
            dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, **sizes, **dropout, use_cache=False, bos_token_id=0, eos_token_id=0
            )
            return transformers.GPT2LMHeadModel(config).to(dtype)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, num_key_value_heads=1, use_cache=False)
        return transformers.LlamaForCausalLM(config).to(dtype)


def lora_config(kind: str, **options: Any) -> Any:
    import peft

    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "o_proj", "down_proj"]
    options = {"r": 2, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": kind == "gpt2", **options}
    return peft.LoraConfig(**options)


def started(model: Any) -> Any:
    """With factors that a training may have come to: B is zero at first."""
    for i, p in enumerate(p for name, p in model.named_parameters() if "lora_" in name):
        p.data = 0.3 * torch.randn(p.shape, generator=seeded(100 + i)).to(p.dtype)
    return model


def make(kind: str, dtype: torch.dtype = FP64, seed: int = 0, **options: Any) -> Any:
    return own(dtype, seed=seed) if kind == "own" else language_model(kind, dtype, seed, **options)


def inputs(model: Any, t: int) -> Tensor:
    """The batch of step ``t``."""
    if isinstance(model, nn.Sequential):
        first = next(p for p in model.parameters())
        return torch.randn(12, first.shape[1], generator=seeded(t)).to(first.dtype)
    return torch.randint(0, VOCABULARY, (4, 6), generator=seeded(t))


def loss_of(model: Any, t: int) -> Tensor:
    x = inputs(model, t)
    if isinstance(model, nn.Sequential):
        return F.cross_entropy(model(x).double(), torch.arange(12) % 4)
    return model(input_ids=x, labels=x).loss.double()


def closure_for(model: Any, opt: Any, t: int) -> Any:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        return loss.detach()

    return closure


def train(model: Any, opt: Any, steps: Any) -> list[float]:
    return [float(opt.step(closure_for(model, opt, t))) for t in steps]


def trained(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def frozen(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def layers_of(model: nn.Module) -> list[tuple[Tensor, list[tuple[Tensor, Tensor, float]]]]:
    """Each adapted weight as [d_out, d_in], and its factors."""
    return [(x.rows, [(f.a, f.b, f.scale) for f in x.factors()]) for x in adapted_weights(model)]


def seen_by(model: nn.Module) -> list[Tensor]:
    """The weights with which adapted layers compute now, as [d_out, d_in]: what they make of unit vectors."""
    seen = []
    for x in adapted_weights(model):
        module, _ = x.owners[0]
        eye = torch.eye(x.rows.shape[1], dtype=x.rows.dtype)
        if isinstance(module, LoRALinear):
            kept, module.scaling = module.scaling, 0.0
            out = module(eye)
            module.scaling = kept
        else:
            out = module(eye)
        seen.append((out - (0.0 if module.bias is None else module.bias)).T.detach())
    return seen
