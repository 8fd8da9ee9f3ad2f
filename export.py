"""Write a checkpoint as a Hugging Face folder, or read such a folder back as a checkpoint.

    python export.py CHECKPOINT=out/sft OUT=out/sft-hf             for AutoModelForCausalLM, vLLM, llama.cpp
    python export.py CHECKPOINT=out/sft OUT=out/sft-hf YARN=4.0    with the context stretched
    python export.py IMPORT=out/sft-hf OUT=out/imported            a Qwen3- or Llama-shaped folder to train on

Dense models become Qwen3ForCausalLM (LlamaForCausalLM where QK_NORM is off), mixtures of experts
Qwen3MoeForCausalLM; both give the same logits. Shared experts, sparse and window attention and the classic
model have no exact standard class and are refused.
"""

import json
import math
from pathlib import Path

import torch

import common

CHECKPOINT = ""       # a folder or file; "" = the newest in out/
OUT = "out/exported"  # folder to write
IMPORT = ""           # a Hugging Face folder to turn into OUT/best.pt instead
YARN = 1.0            # stretches the context by this factor (YaRN)
DTYPE = "float32"     # of the exported weights; "bfloat16" and "float16" are smaller and round


def config_of(sizes):
    """config.json of a model of these sizes. Raises BadInput where no standard class is exact."""
    s, yarn = dict(sizes), YARN if YARN != 1 else sizes["yarn"]
    if s.get("attention", "full") != "full":
        raise common.BadInput(
            f"ATTENTION={s['attention']} has no standard class in transformers; a model with full "
            "attention can be exported"
        )
    if s.get("n_before"):
        raise common.BadInput(f"N_BEFORE={s['n_before']}, embeddings of earlier tokens, has no standard "
                              "class in transformers; a model with N_BEFORE=0 can be exported")
    if s["n_experts"] and s["n_shared"]:
        raise common.BadInput(
            f"N_SHARED={s['n_shared']} shared experts have no exact standard class (Qwen2-MoE gates "
            "them); train with N_SHARED=0 to export"
        )
    if s["n_experts"] and not s["qk_norm"]:
        raise common.BadInput("experts without QK_NORM have no exact standard class; train with QK_NORM=True")
    kind = "qwen3_moe" if s["n_experts"] else "qwen3" if s["qk_norm"] else "llama"
    rope = {"rope_type": "default", "rope_theta": s["theta"]}
    if yarn != 1:
        rope = {"rope_type": "yarn", "rope_theta": s["theta"], "factor": yarn,
                "original_max_position_embeddings": s["seq_len"]}
    config = {
        "architectures": [
            {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM"}[
                kind
            ]
        ],
        "model_type": kind,
        "vocab_size": s["vocab_size"],
        "hidden_size": s["dim"],
        "intermediate_size": s["hidden_dim"],
        "num_hidden_layers": s["n_layers"],
        "num_attention_heads": s["n_heads"],
        "num_key_value_heads": s["n_kv_heads"],
        "head_dim": s["head_dim"],
        "rms_norm_eps": s["eps"],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": s["tied"],
        "max_position_embeddings": int(s["seq_len"] * yarn),
        "rope_theta": s["theta"],
        "rope_scaling": None if yarn == 1 else rope,
        "rope_parameters": rope,
        "bos_token_id": common.BOS,
        "eos_token_id": common.EOS,
        "pad_token_id": common.PAD,
        "torch_dtype": DTYPE,
        "use_cache": True,
    }
    if s["n_experts"]:
        config |= {
            "num_experts": s["n_experts"],
            "num_experts_per_tok": s["n_active"],
            "norm_topk_prob": True,
            "moe_intermediate_size": s["hidden_dim"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
        }
    return config


def export():
    """Write CHECKPOINT as a Hugging Face folder."""
    from safetensors.torch import save
    path = common.newest_checkpoint(CHECKPOINT)
    found = common.load(path)
    if found["kind"] != "LM":
        raise common.BadInput(f"{path} holds a {found['kind']}; only language models have a standard class")
    if DTYPE not in ("float32", "bfloat16", "float16"):
        raise common.BadInput(f"DTYPE {DTYPE!r} is not one of float32, bfloat16, float16")
    common.within(1, 1000, YARN=YARN)
    config, out = config_of(found["sizes"]), Path(OUT)
    if any(out.glob("*.pt")):
        raise common.BadInput(f"OUT={OUT} holds a run, whose config.json and weights would be written over; "
                              "choose another OUT")
    state = common.build(found).state_dict()
    state = {common.hf_name(k): v.to(getattr(torch, DTYPE)).contiguous() for k, v in state.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.BadInput(f"cannot write to OUT={OUT} ({error.strerror}); choose another OUT") from None
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")} | {
        "do_sample": True, "temperature": 0.8}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        text = json.dumps(value, indent=1).encode()
        common.write_whole(out / name, lambda file, text=text: file.write(text))
    common.write_whole(out / "model.safetensors", lambda file: file.write(save(state, {"format": "pt"})))
    common.copy_tokenizer(path.parent, out)
    if (out / "tokenizer.json").exists() and (out / "tokenizer_config.json").exists():
        about = json.loads((out / "tokenizer_config.json").read_text())
        tokenizer = common.load_tokenizer(out / "tokenizer.json")
        pad, bos, eos = common.special_names(tokenizer)
        about |= {
            "model_max_length": config["max_position_embeddings"],
            "chat_template": common.chat_template(tokenizer),
            "pad_token": pad, "bos_token": bos, "eos_token": eos,
        }
        text = json.dumps(about, ensure_ascii=False, indent=1).encode()
        common.write_whole(out / "tokenizer_config.json", lambda file: file.write(text))
    size = sum(v.numel() for v in state.values())
    bare = "" if (out / "tokenizer.json").exists() else f"; no tokenizer: {path.parent} has none"
    print(f"{out}: {config['architectures'][0]}, {size / 1e6:.1f}M parameters {DTYPE}, of {path}{bare}")
    return out


def sizes_of(config, folder):
    """Constructor sizes of LM for a config.json. Raises BadInput where LM cannot be that model."""
    kind = config.get("model_type")
    if kind not in ("qwen3", "qwen3_moe", "llama"):
        raise common.BadInput(f"{folder} holds a {kind}; qwen3, qwen3_moe and llama can be read")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "yarn"):
        raise common.BadInput(
            f"{folder} has rope_type {rope.get('rope_type', rope.get('type'))}; default and yarn can be read"
        )
    if config.get("hidden_act", "silu") != "silu" or config.get("attention_bias") or config.get("mlp_bias"):
        raise common.BadInput(
            f"{folder} has biases or hidden_act {config.get('hidden_act')}; this model has no biases and silu"
        )
    if config.get("use_sliding_window"):
        raise common.BadInput(f"{folder} has use_sliding_window; full attention can be read")
    heads = config["num_attention_heads"]
    seq_len, yarn = config.get("max_position_embeddings", 2048), 1.0
    if rope.get("rope_type", rope.get("type")) == "yarn":
        plain = dict(attention_factor=None, beta_fast=32, beta_slow=1, mscale=None, mscale_all_dim=None,
                     truncate=True)
        other = {k: rope[k] for k, v in plain.items() if rope.get(k) not in (v, None)}
        if other:
            raise common.BadInput(f"{folder} has a YaRN of its own: {other}; only the factor can be read")
        yarn = float(rope["factor"])
        seq_len = rope.get("original_max_position_embeddings") or int(seq_len / yarn)
    sizes = dict(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        hidden_dim=config["intermediate_size"],
        seq_len=seq_len,
        theta=rope.get("rope_theta") or config.get("rope_theta", 1e4),
        yarn=yarn,
        tied=bool(config.get("tie_word_embeddings")),
        qk_norm=kind != "llama",
        eps=config.get("rms_norm_eps", 1e-6),
        n_shared=0,
    )
    if kind == "qwen3_moe":
        if (
            not config.get("norm_topk_prob")
            or config.get("decoder_sparse_step", 1) != 1
            or config.get("mlp_only_layers")
        ):
            raise common.BadInput(f"{folder}: experts must be in every layer, their weights renormalised "
                                  "(norm_topk_prob)")
        sizes |= dict(n_experts=config["num_experts"], n_active=config["num_experts_per_tok"],
                      hidden_dim=config["moe_intermediate_size"])
    return sizes


def load_folder(folder):
    """A checkpoint dict (kind, sizes, model, step) of a Hugging Face folder. Raises BadInput."""
    folder = Path(folder)
    try:
        sizes = sizes_of(common.read_json(folder / "config.json"), folder)
    except KeyError as error:
        raise common.BadInput(f"{folder}/config.json lacks {error}") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise common.BadInput(f"{folder} has no .safetensors; save the model with safe_serialization")
    state = {k: v for file in files for k, v in common.read_safetensors(file).items()}
    with torch.device("meta"):
        model = common.LM(**sizes)
    wanted = {common.hf_name(k): k for k in model.state_dict()}
    extra = [k for k in state if k not in wanted and not (k == "lm_head.weight" and sizes["tied"])
             and not k.endswith("rotary_emb.inv_freq")]
    missing = [k for k in wanted if k not in state]
    if missing or extra:
        raise common.BadInput(
            f"{folder} does not fit its config.json: missing {missing[:3]}, unknown {extra[:3]}"
        )
    weights = {wanted[k]: state[k].float() for k in wanted}
    for name, value in model.state_dict().items():
        if weights[name].shape != value.shape:
            raise common.BadInput(f"{folder}: {name} is {tuple(weights[name].shape)}, config.json asks for "
                                  f"{tuple(value.shape)}")
    return {"kind": "LM", "sizes": model.sizes, "model": weights, "step": 0}


def read_back():
    """Write OUT/best.pt of the Hugging Face folder IMPORT."""
    found, out = load_folder(IMPORT), Path(OUT)
    if out.resolve() == Path(IMPORT).resolve():
        raise common.BadInput(f"OUT={OUT} is the folder to read; choose another OUT")
    if not (Path(IMPORT) / "tokenizer.json").is_file():
        raise common.BadInput(f"{IMPORT} has no tokenizer.json")
    tokenizer = common.load_tokenizer(Path(IMPORT) / "tokenizer.json")
    common.token_bytes(tokenizer)                        # refuses what is not byte-level
    n, padded = tokenizer.get_vocab_size(), found["sizes"]["vocab_size"]
    if n > padded:
        raise common.BadInput(f"{IMPORT}: the tokenizer has {n} tokens, the model {padded}")
    if n < padded:
        print(f"{IMPORT}: the last {padded - n} of {padded} rows of its vocabulary are no tokens: left out")
        found["sizes"]["vocab_size"] = n
        for name in ("embedding.weight", "head.weight"):
            if name in found["model"]:
                found["model"][name] = found["model"][name][:n].clone()
    common.set_aside(out, "another checkpoint takes its place")
    out.mkdir(parents=True, exist_ok=True)
    common.copy_tokenizer(IMPORT, out)
    found["metrics"] = {"loss": math.nan}
    common.write_whole(out / "best.pt", lambda file: torch.save(found, file))
    size = sum(v.numel() for v in found["model"].values())
    print(f"{out}/best.pt: {size / 1e6:.1f}M parameters; train on: python train_sft.py INIT={out}")
    return out


def main():
    return read_back() if IMPORT else export()


if __name__ == "__main__":
    common.cli(globals(), main)
