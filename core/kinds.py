"""What a model folder is, before its weights are read; and what of it will be written back.

    check_kind("your/model")                # one line where it is none that can be trained and decoded here
    bases("your/adapter")                   # the folders it is made of: [your/adapter, its base]
    named_ends("your/model")                # the ids that its generation settings name as ends
    write_folder(model, tokenizer, state, folder)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from core.answers import optional
from core.chat import ends
from core.ranks import first_line

# What the decoder's cache holds: keys and values of each token, whatever a layer then looks at.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
OTHER_SENSES = ("vision", "image", "audio", "speech", "video")


def check_kind(path: str) -> list[str]:
    """Raises OSError, in one line, where a folder or hub name holds something else than a causal language model that
    keeps keys and values; else returns what it is made of (`bases`). What cannot be read at all is left to those who
    load it. No code of the model's is run."""
    from transformers import PreTrainedConfig

    found = bases(path)
    if len(found) == 1:
        check_model(path)
        return found
    try:
        PreTrainedConfig.get_config_dict(found[-1])
        check_model(found[-1])
    except Exception as error:
        raise OSError(
            f"--model {path}: an adapter whose base {found[-1]} cannot be had ({first_line(error)}); if it lies "
            "elsewhere, write that place into adapter_config.json as base_model_name_or_path"
        ) from None
    return found


def check_model(path: str) -> None:
    """`check_kind` of a model that is no adapter."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto import configuration_auto, modeling_auto

    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
    except Exception:  # no such folder, or half a file
        return
    if not isinstance(raw, dict):
        return
    if how := raw.get("quantization_config"):
        kind = how.get("quant_method") if isinstance(how, dict) else how
        raise OSError(f"--model {path}: its weights are quantised ({kind}): training needs those it was made from")
    if "auto_map" in raw and raw.get("model_type") not in configuration_auto.CONFIG_MAPPING:
        raise OSError(
            f"--model {path}: a model with code of its own (auto_map, {raw.get('model_type')}), which transformers "
            "does not have; such code is never run here"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
    except Exception:
        return
    what = config.model_type
    if text is not config or any(part.startswith(OTHER_SENSES) for part in config.sub_configs):
        raise OSError(
            f"--model {path}: {what} is a model of more than text; save the language model in it as a folder of its "
            "own first (docs/data.md)"
        )
    kinds = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and type(config) in kinds:
        raise OSError(f"--model {path}: {what} is an encoder and a decoder; a causal language model is needed")
    if type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING:
        raise OSError(f"--model {path}: {what} is a masked language model; a causal one is needed")
    model = kinds.get(type(config), None)
    other = sorted({*(getattr(config, "layer_types", None) or [])} - ATTENTION)
    if getattr(model, "_is_stateful", False) or other:
        layers = f" ({', '.join(other)})" if other else ""
        raise OSError(
            f"--model {path}: {what} has layers that keep a state in place of keys and values{layers}; only attention "
            "models can be decoded here"
        )


def bases(path: str) -> list[str]:
    """The folders or hub names that a model is made of: its own alone, or that of an adapter and that of its base,
    which may be an adapter again. Raises OSError."""
    found = [path]
    while config := cached(found[-1], "adapter_config.json"):
        try:
            optional("peft", "peft")
            named = json.loads(Path(config).read_text()).get("base_model_name_or_path")
            if not isinstance(named, str) or not named.strip():
                raise ValueError("adapter_config.json names no base: write it there, as base_model_name_or_path")
            if named in found:
                raise ValueError("adapter_config.json names the adapter itself as its base (base_model_name_or_path)")
        except (ValueError, AttributeError) as error:
            raise OSError(f"--model {path}: an adapter; {first_line(error)}") from None
        found.append(named)
    return found


def cached(path: str, name: str) -> str | None:
    """Where a file of a model folder or hub name lies; None where there is none."""
    from transformers.utils import cached_file

    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except Exception:  # no such folder, or no hub
        return None


def named_ends(path: str) -> list[int]:
    """The ids that generation_config.json, or config.json where there is none, names as ends. Raises OSError."""
    from transformers import GenerationConfig, PreTrainedConfig

    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as error:
        if os.path.exists(os.path.join(path, "generation_config.json")):
            raise OSError(f"--model {path}: generation_config.json cannot be read ({first_line(error)})") from None
        try:
            named = PreTrainedConfig.get_config_dict(path)[0].get("eos_token_id")
        except Exception:  # which is said where the config is needed
            named = None
    return token_list(named)


def token_list(named: object) -> list[int]:
    named = named if isinstance(named, list) else [named]
    return [token for token in named if isinstance(token, int) and token >= 0]


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def settle_generation(model, tokenizer) -> str:
    """Writes the tokens that end a response into the model's settings, first what y was trained to end with, and takes
    out of them what transformers would refuse to save -> a note on that. Raises ValueError."""
    config, settings = model.config, model.generation_config
    first, *others = ends(tokenizer)
    config.eos_token_id = first
    several = list(dict.fromkeys([first, *others, *token_list(settings.eos_token_id)]))
    settings.eos_token_id = several if len(several) > 1 else first
    dropped = []
    if settings.do_sample is not True:
        usual = type(settings)()
        dropped = [name for name in SAMPLING if getattr(settings, name, None) not in (None, getattr(usual, name, None))]
    try:
        settings.validate(strict=True)
    except ValueError:
        for name in dropped:
            setattr(settings, name, None)
        try:
            settings.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the model's generation_config.json could not be saved again: {reason}") from None
        return f"generation_config.json sets {', '.join(dropped)} but not do_sample: they are left out of what is saved"
    return ""


def write_folder(model, tokenizer, state: dict, folder: Path) -> str:
    """A Hugging Face folder of these weights -> a note on what of the model's settings is left out. Raises whatever
    transformers does where it cannot be written."""
    note = settle_generation(model, tokenizer)
    model.save_pretrained(folder, state_dict=state)
    kinds = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    if len(kinds) == 1 and f"torch.{min(kinds)}" != str(model.dtype):  # which is that of frozen weights, say
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {"dtype": min(kinds)}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    return note
