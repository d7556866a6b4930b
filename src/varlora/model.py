"""Load a causal language model with LoRA, and read the logits of the possible answers from it.

The base is frozen, in full precision or quantised; what is trained is the adapter (Hu et al. 2022): a linear layer
W x becomes W x + (alpha / rank) B A dropout(x) with A (rank, in) and B (out, rank). B starts at zero, A at random.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from varlora.adapter import seeded
from varlora.errors import ConfigError, VarloraError, did_you_mean
from varlora.stack import out_of_memory

__all__ = [
    "LoRA",
    "base_fingerprint",
    "class_logits",
    "load_model",
    "lora_targets",
    "same_checksum",
]

ALL = "all-linear"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("8bit", "4bit")

# How architectures name their query and value projections; the first row whose layers all exist is taken.
TARGETS = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, Phi, GPT-J, ...
    ("query", "value"),  # BERT and its kin as decoders
    ("q_b_proj", "kv_b_proj"),  # latent attention: DeepSeek
    ("q_proj", "kv_b_proj"),  # latent attention with an uncompressed query: DeepSeek-V2-Lite
    ("Wq", "Wv"),  # CTRL
    ("c_attn",),  # query, key and value in one matrix, so the key is adapted too: GPT-2, StarCoder
    ("query_key_value",),  # GPT-NeoX, Falcon, Bloom, Persimmon
    ("qkv_proj",),  # Phi-3, CodeGen
    ("Wqkv",),  # MPT, DBRX
)


# Architectures that take no `position_ids` and need none: their attention counts distances, or they skip padding.
RELATIVE = ("bloom", "mpt", "mamba", "mamba2", "falcon_mamba")
FROM_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"),
)
"""Model types whose first token has the position after the padding token's number."""
SEES_PADDING = ("recurrent_gemma", "deepseek_v4")
"""Model types that take `position_ids`, but mix padding into tokens: by a convolution, by groups of absolute places."""
SCALES = (".SCB", ".absmax")
"""Ends of the names under which bitsandbytes saves the largest absolute values of rows (8 bit) or blocks (4 bit)."""


@dataclass(frozen=True)
class LoRA:
    """The adapter's settings; the defaults are the paper's, but for `dtype`.

    That is float32, where the paper keeps 16 bit, because AdamW's small updates round to nothing in bfloat16. B starts
    at 0 and A as in PEFT, uniform at random (Kaiming), where the paper says Gaussian.

    Raises:
        ConfigError: settings are out of their range; all of them are told together.

    Example:
        >>> LoRA(rank=16, alpha=32)
        LoRA(rank=16, alpha=32, dropout=0.1, targets=None, dtype='float32')

    References:
        Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
    """

    rank: int = 8
    """Rows of A and columns of B: the rank of the update to each weight matrix."""
    alpha: float = 16
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.1
    """Probability with which an input of A is dropped while training."""
    targets: tuple[str, ...] | Literal["all-linear"] | None = None
    """Names of the adapted linear layers (the ends of their full names); None: query and value, by `lora_targets`; all
    of the language part but the output layer: `all-linear`, as in PEFT, which takes those of other parts as well."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the adapter's weights, whatever the base's; the paper keeps them in 16 bit."""

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1 or self.rank != int(self.rank):
            problems.append(f"Expected `rank` to be a whole number >= 1, but got {self.rank}. The paper's is 8.")
        if not self.alpha > 0:
            problems.append(f"Expected `alpha` to be > 0, but got {self.alpha}. The paper's is 16.")
        if not 0 <= self.dropout < 1:
            problems.append(f"Expected `dropout` to be in [0, 1), but got {self.dropout}. The paper's is 0.1.")
        if self.targets not in (None, ALL) and (isinstance(self.targets, str) or not self.targets):
            problems.append(
                f'Expected `targets` to be layer names such as ("q_proj", "v_proj"), or "{ALL}", but got '
                f"{self.targets!r}."
            )
        if self.dtype not in DTYPES:
            problems.append(_unknown("dtype", self.dtype, DTYPES))
        if problems:
            raise ConfigError(problems)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    quantization: Literal["8bit", "4bit"] | None = None,
    lora: LoRA | None = LoRA(),
    seed: int = 0,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model, freeze it and put a fresh LoRA adapter on it.

    Only safetensors are read and no code that comes with a model is run. A warning names weights in the files that the
    model has no place for.

    Args:
        name_or_path: a folder, or a model's name on the hub.
        dtype: type of the base's weights, and of what is not quantised if the base is.
        quantization: keep the base's linear layers in 8 bit (LLM.int8) or 4 bit (NF4), by bitsandbytes.
        lora: the adapter's settings; None: the frozen base alone.
        seed: of the adapter's random A; the same seed gives the same bits, and the global random state is left alone.
        device: where the model goes; None: the current CUDA device, or the CPU without one.
        revision: branch, tag or commit on the hub; None: the main branch.

    Returns:
        The model, in evaluation mode, and its tokenizer, which pads on the left. With `lora` the model is a
        `peft.PeftModel` and the parameters that require a gradient are the adapter's.

    Raises:
        VarloraError: if the model cannot be found or read, is no causal language model, comes with an adapter or does
            not fit its weights, or an argument is wrong.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> folder = tempfile.mkdtemp()
        >>> GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)).save_pretrained(folder)
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "yes": 1}, unk_token="<eos>"))
        >>> _ = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
        >>> model, tokenizer = load_model(folder, lora=LoRA(rank=2), device="cpu")
        >>> [tuple(value.shape) for value in model.parameters() if value.requires_grad]
        [(2, 8), (24, 2)]

    References:
        Hu et al. (2022), LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685
        Dettmers et al. (2022), LLM.int8(), https://arxiv.org/abs/2208.07339; (2023), QLoRA (NF4),
        https://arxiv.org/abs/2305.14314
    """
    if dtype not in DTYPES:
        raise VarloraError(_unknown("dtype", dtype, DTYPES))
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise VarloraError(_unknown("quantization", quantization, QUANTIZATIONS, " or None"))
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise VarloraError(
            f'`quantization="{quantization}"` needs bitsandbytes. Run: pip install varlora[quantization]'
        )
    source = _source(name_or_path)
    # False, not None: with None, transformers asks on the terminal whether to run a model's own code
    hub: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}

    with _explained(source):
        config = AutoConfig.from_pretrained(source, **hub)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise VarloraError(_not_causal(source, config, "transformers has no causal language model of this type"))
    place = _device(device)
    with _explained(source):
        if find_adapter_config_file(source, revision=hub["revision"]):  # transformers would put it into the model
            raise VarloraError(
                f"Expected a base model alone, but {source} also holds an adapter. Take a copy without "
                "adapter_config.json and the adapter's weights."
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        model = _base(source, config, DTYPES[dtype], quantization, place, hub)
    if not getattr(model, "is_quantized", False):  # bitsandbytes has placed it, also where it was saved quantised
        model.to(place)
    _set_padding(tokenizer, model)
    return (model if lora is None else _adapted(model, lora, seed)).eval(), tokenizer


def lora_targets(model: nn.Module) -> list[str]:
    """Name the layers that compute query and value in the model's attention.

    Where query, key and value are one fused matrix, that matrix is named, so the key is adapted as well. Of a model
    that also sees or hears, the language part's layers alone are named, by their full names if that is needed.

    Args:
        model: a causal language model of transformers.

    Returns:
        Ends of layer names, as `LoRA.targets` takes them.

    Raises:
        VarloraError: if none of the known names occurs; it lists the linear layers that there are.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> lora_targets(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)))
        ['c_attn']
    """
    linear = _linear_layers(model)
    leaves = {name.rpartition(".")[2] for name in linear}
    found = next((row for row in TARGETS if leaves.issuperset(row)), None)
    if found is None:
        raise VarloraError(
            f"Found no query and value projections in {type(model).__name__}. Pass `targets` to LoRA with names of its "
            f"linear layers: {', '.join(sorted(leaves))}."
        )
    inside = {id(layer) for layer in _linear_layers(_language_part(model)).values()}
    matches = {name: id(layer) in inside for name, layer in linear.items() if name.rpartition(".")[2] in found}
    if any(matches.values()) and not all(matches.values()):
        return [name for name, in_text in matches.items() if in_text]
    return list(found)


def _all_linear(model: Any) -> list[str]:
    """Name all linear layers of the language part but the output layer, by their ends if no other layer has them."""
    inside = {id(layer) for layer in _linear_layers(_language_part(model)).values()} - {
        id(model.get_output_embeddings())
    }
    linear = _linear_layers(model)
    wanted = {name for name, layer in linear.items() if id(layer) in inside}
    ends = {name.rpartition(".")[2] for name in wanted}
    return sorted(wanted if any(name.rpartition(".")[2] in ends for name in linear.keys() - wanted) else ends)


def _language_part(model: Any) -> Any:
    """Return the part of a model that reads and writes text: of one that also sees or hears, its decoder."""
    config = getattr(model, "config", None)
    return model if config is None or config.get_text_config() is config else model.get_decoder()


def class_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits that the model gives to each row's possible answers as the next token.

    The output layer sees the last position only, so (B, T, vocabulary) logits never exist. Positions are counted from
    the first real token, so padding does not change the result; but for models with longrope, whose factor for all rows
    goes by the longest of a batch.

    Args:
        model: a causal language model of transformers: plain, with an adapter, compiled or in a parallel wrapper.
        batch: `input_ids` (B, T), padded on the left; `attention_mask` (B, T), 0 at padding; `label_tokens` (B, C), the
            token of each answer; `answer_mask` (B, C), False where a row has fewer than C answers. Other keys are
            ignored. Tensors may lie on any device.

    Returns:
        Logits (B, C), float32, -inf where `answer_mask` is False.

    Raises:
        VarloraError: if the architecture cannot compute the last position alone, or would answer otherwise because of
            the padding that a batch has.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)).eval()
        >>> batch = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
        >>> batch |= {"label_tokens": torch.tensor([[3, 4, 0]]), "answer_mask": torch.tensor([[True, True, False]])}
        >>> logits = class_logits(model, batch)
        >>> logits.shape, logits[0, 2].item()
        (torch.Size([1, 3]), -inf)
    """
    inner = _unwrapped(model)
    takes = inspect.signature(type(inner).forward).parameters
    if "logits_to_keep" not in takes:
        raise VarloraError(
            f"Expected a causal language model whose forward takes `logits_to_keep`, but {type(inner).__name__} does "
            "not, so it would compute the logits of every position. Use another architecture."
        )
    device = next(inner.parameters()).device
    keys = ("input_ids", "attention_mask", "label_tokens", "answer_mask")
    input_ids, attention_mask, label_tokens, answer_mask = (batch[key].to(device) for key in keys)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}
    kind = inner.config.model_type
    mixes = kind in SEES_PADDING or ("position_ids" not in takes and kind not in RELATIVE)
    if mixes and not attention_mask.all():  # which waits for the device
        raise VarloraError(
            "Expected a batch without padding, but got one with it, which would change the answers of "
            f"{type(inner).__name__}. Pass one row each (`batch_size`, `token_budget` 1), or use another architecture."
        )
    if "position_ids" in takes:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
        inputs["position_ids"] = positions + first_position(inner.config)
    if "use_cache" in takes:
        inputs["use_cache"] = False
    logits = model(**inputs).logits[:, -1].float()  # (B, 1, V) -> (B, V)
    # what stands in `label_tokens` where there is no answer is of no matter, not even if it is no token
    logits = logits.gather(1, label_tokens.masked_fill(~answer_mask, 0))  # (B, V) -> (B, C)
    return logits.masked_fill(~answer_mask, float("-inf"))


def first_position(config: Any) -> int:
    """Return the position of a prompt's first token, before which a model has no use for any."""
    return int(config.pad_token_id) + 1 if config.model_type in FROM_PADDING else 0


class_logits.last_position_alone = True  # type: ignore[attr-defined]  # see varlora.drawing.Forward


def _base(
    source: str, config: Any, dtype: torch.dtype, quantization: str | None, device: torch.device, hub: dict[str, Any]
) -> Any:
    """Load the frozen base; a quantised one onto the device."""
    # No `prepare_model_for_kbit_training`: the paper has none of it. It turns all that is not quantised to float32,
    # against `dtype`, and switches on gradient checkpointing, which the Trainer has an option for. Gradients reach the
    # adapter without it, because every quantised layer passes them on to its input.
    options: dict[str, Any] = {}
    if quantization == "8bit":
        options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    elif quantization == "4bit":
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options = {"quantization_config": nf4, "device_map": {"": device}}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # to tell of them ourselves
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype, use_safetensors=True, **options, **hub
    )
    model, info = loaded
    # BERT and its kin see the words to come unless told otherwise; GPT-NeoX has the same field and never reads it
    if getattr(model.config, "is_decoder", None) is False and not config.model_type.startswith("gpt_neox"):
        raise VarloraError(_not_causal(source, config, "its attention sees both sides (`is_decoder` is false)"))
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        why = f"its files lack weights of {type(model).__name__} ({missing}), which would be random"
        raise VarloraError(_not_causal(source, config, why))
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise VarloraError(
            f"Expected the weights of {source} to have the shapes that its config.json says, but {name} is "
            f"{tuple(found)} and not {tuple(expected)}. Pass the folder as it was saved."
        )
    if unexpected := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{len(unexpected)} weights in the files of {source} have no place in {type(model).__name__} and are left "
            f"out, e.g. {unexpected[0]}. If the model needs them, its config.json is another model's.",
            stacklevel=3,
        )
    model.requires_grad_(False)
    for layer in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights for good at the first evaluation, for a kernel
        # without a backward pass: an evaluation in mid-training would cut off the gradients from then on.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def _adapted(model: Any, lora: LoRA, seed: int) -> Any:
    """Put a fresh adapter on the base."""
    linear = _linear_layers(model)
    if lora.targets == ALL:
        targets = _all_linear(model)
    else:
        targets = lora_targets(model) if lora.targets is None else list(lora.targets)
    chosen: list[nn.Module] = []
    for target in targets:
        layers = [layer for name, layer in linear.items() if name == target or name.endswith(f".{target}")]
        if not layers:
            hint = did_you_mean(target, {name.rpartition(".")[2] for name in linear})
            raise VarloraError(
                f"Expected `targets` to be linear layers of {type(model).__name__}, but got {target!r}. {hint}"
            )
        chosen += layers
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in chosen),  # GPT-2 stores its weights transposed
    )
    with seeded(seed):
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT gives an adapter the base's type
            parameter.data = parameter.data.to(DTYPES[lora.dtype])
    return model


def _set_padding(tokenizer: Any, model: Any) -> None:
    """Pad on the left, with a token that the embeddings have: padding is masked, so which one is of no matter."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise VarloraError(
            "Expected a tokenizer with a padding, end-of-text or unknown token, but it has none. Set `pad_token` in "
            "its tokenizer_config.json to one of its tokens."
        )


def _device(device: str | torch.device | None) -> torch.device:
    """Resolve the device, with its index: the Trainer compares it with its own."""
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that LoRA can adapt, quantised ones included, by full name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def _unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, a compiled one or a parallel wrapper."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            return model


def _source(name_or_path: str | Path) -> str:
    """Return the folder or hub name to load from, after the checks that need no network."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        name = str(name_or_path)
        is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if is_path or isinstance(name_or_path, Path) or (len(path.parts) == 2 and path.parent.is_dir()):
            raise VarloraError(
                f"Expected `model` to be a folder, but {name} does not exist.{_near_folders(path)} "
                "Give another `--model`."
            )
        return name
    if not path.is_dir():
        raise VarloraError(f"Expected `model` to be a folder, but {path} is a file. Pass the folder that it lies in.")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise VarloraError(
                f"Expected a base model, but {path} is an adapter. Pass the base that it was trained on."
            )
        raise VarloraError(
            f"Expected `model` to be a model's folder, but {path} has no config.json. Save it by `save_pretrained`."
        )
    if not any(path.glob("*.safetensors")):
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(pattern))]
        raise VarloraError(_no_safetensors(str(path), f"only {pickled[0]}" if pickled else "no weights at all"))
    return str(path)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Say what to do about what transformers raises for a model that it cannot find or read.

    That may be anything: a config.json can hold whatever.
    """
    try:
        yield
    except VarloraError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        causes: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        text = " ".join(str(error).split())
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            cure = f"It is gated: accept its terms at https://huggingface.co/{source}, then run `hf auth login`."
        elif any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            cure = "The hub has the model, but not this `revision`."
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            cure = "The hub has no such model, or it is private (`hf auth login`)." + _near_folders(Path(source))
        elif "trust_remote_code" in text or "custom code" in text:
            cure = "It brings code of its own, which is never run here. Use an architecture that transformers has."
        elif "does not appear to have a file named" in text and "safetensors" in text:
            raise VarloraError(_no_safetensors(source, "none")) from error
        elif isinstance(error, OSError) and not Path(source).is_dir():
            cure = (
                "No folder here has this name, and the hub could not be asked for it. Offline: run `hf download "
                f"{source}` where there is a network and pass the folder that it prints." + _near_folders(Path(source))
            )
        else:
            cure = "A file may be missing or damaged, config.json of another model, or transformers too old for it."
        raise VarloraError(f"Cannot load the model {source}. {cure} transformers says: {text[:300]}") from error


def _near_folders(path: Path) -> str:
    """Offer the folders whose names are like the missing one's."""
    folders = {folder.name for folder in path.parent.iterdir() if folder.is_dir()} if path.parent.is_dir() else set()
    near = difflib.get_close_matches(path.name, sorted(folders), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(f'`{path.parent / name}`' for name in near)}?" if near else ""


def _no_safetensors(source: str, found: str) -> str:
    return (
        f"Expected weights in safetensors in {source}, but found {found}. Pickled weights can run code and are not "
        "read. If you trust them, convert them once: "
        "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`."
    )


def _not_causal(source: str, config: Any, why: str) -> str:
    return (
        f"Expected a causal language model, but {source} is none: {why}. Its config says `{config.model_type}`, "
        f"{config.architectures}. Use a model such as Llama, Qwen or GPT-2, with its language-model head."
    )


def _unknown(argument: str, value: Any, known: Mapping[str, Any] | tuple[str, ...], end: str = "") -> str:
    hint = did_you_mean(str(value), known)
    return f"Expected `{argument}` to be {' or '.join(known)}{end}, but got {value!r}. {hint}"


def base_fingerprint(model: nn.Module) -> str:
    """Return a checksum that tells one frozen base from another of the same shapes.

    It is made of some values, evenly spaced, of each frozen parameter, so it is quick, and the same on every device. Of
    quantised weights these are the scales, the largest absolute values: the rounded weights depend on the device.

    Args:
        model: a model from `load_model`.

    Returns:
        A SHA-256 in hexadecimal digits; of a quantised base, a second one of the scales after a hyphen.

    Example:
        >>> layer = nn.Linear(2, 1).requires_grad_(False)
        >>> before = base_fingerprint(layer)
        >>> _ = layer.weight.add_(1.0)
        >>> base_fingerprint(layer) == before
        False
    """
    full = [(name, p) for name, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()]
    scales = [(name, value) for name, value in model.state_dict().items() if name.endswith(SCALES)]
    return f"{_digest(full)}-{_digest(scales)}" if scales else _digest(full)


def same_checksum(stored: str, now: str) -> bool:
    """Whether a stored checksum is that of now; one of a quantised base may have been stored without its scales.

    Example:
        >>> same_checksum("f00d", "f00d-cafe"), same_checksum("f00d-cafe", "f00d-beef")
        (True, False)
    """
    return stored in (now, now.partition("-")[0])


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a checksum of names and evenly spaced values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        values = tensor.detach().flatten()
        digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
