"""Hugging Face architectures under PEFT: decoders, encoders, encoder-decoders, vision, classification heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mobizo_passes as mz
from tests.coverage.peft_rows import QV, VOCABULARY, attach
from tests.coverage.row import BOTH, ONE_SIDED, SIGNS, Refusal, Row, filled
from tests.models import BATCH, LENGTH, integers, llama_inputs, random

# Llama's names for sizes, which most decoders share; no two widths are equal.
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}  # fmt: skip
LLAMA4 = {**LLAMA, "num_hidden_layers": 1, "intermediate_size_mlp": 20, "num_local_experts": 2, "head_dim": 4,
          "no_rope_layers": [1]}  # fmt: skip
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
           "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DEBERTA = {**ENCODER, "num_hidden_layers": 1, "relative_attention": True, "position_biased_input": False,
           "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}  # fmt: skip
RWKV = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 16,
        "attention_hidden_size": 16}  # fmt: skip
IMAGES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 8, "patch_size": 4, "num_labels": 5}  # fmt: skip
WHISPER = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
           "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
           "num_mel_bins": 6, "max_source_positions": 5, "max_target_positions": 16, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


def build(name: str, targets: Any, sizes: dict[str, Any], head: str = "ForCausalLM", **more: Any) -> nn.Module:
    """`name` is the stem of the model's and its config's classes; `scale` and PEFT's options may be among `more`."""
    import transformers

    scale = more.pop("scale", 0.3)
    lora = {key: more.pop(key) for key in ("modules_to_save", "fan_in_fan_out", "target_parameters") if key in more}
    config_class = getattr(transformers, f"{name}TextConfig" if name in ("Gemma3", "Llama4") else f"{name}Config")
    model = getattr(transformers, name + head)(config_class(**{**sizes, **more}))
    return filled(attach(model, targets, **lora), scale=scale)


def decoder(name: str, targets: Any = "all-linear", sizes: dict[str, Any] = LLAMA, **more: Any) -> Callable[[], Any]:
    return lambda: build(name, targets, sizes, **more)


def llava() -> nn.Module:
    import transformers

    one_layer: dict[str, Any] = {"num_hidden_layers": 1}
    sizes: dict[str, Any] = {
        "vision_config": transformers.CLIPVisionConfig(**{**IMAGES, **one_layer}),
        "text_config": transformers.LlamaConfig(**{**LLAMA, **one_layer}),
        "image_token_id": 3,
        "vision_feature_layer": -1,
    }
    config = transformers.LlavaConfig(**sizes)
    return filled(attach(transformers.LlavaForConditionalGeneration(config), "all-linear"), scale=0.3)


def looked_at() -> dict[str, Tensor]:
    """Text with four places for an image, elsewhere in each example."""
    tokens = integers(VOCABULARY - 4, BATCH, 8) + 4
    for row in range(BATCH):
        tokens[row, row : row + 4] = 3
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    return {"input_ids": tokens, "pixel_values": random(BATCH, 3, 8, 8), "labels": labels}


def classified() -> dict[str, Tensor]:
    words = {k: v for k, v in llama_inputs().items() if k != "labels"}
    return {**words, "labels": integers(2, BATCH)}


def tagged() -> dict[str, Tensor]:
    labels = integers(2, BATCH, LENGTH)
    labels[:, 0] = -100
    return {**classified(), "labels": labels}


def answered() -> dict[str, Tensor]:
    words = {k: v for k, v in llama_inputs().items() if k != "labels"}
    return {**words, "start_positions": integers(3, BATCH), "end_positions": integers(3, BATCH, seed=9) + 2}


def translated() -> dict[str, Tensor]:
    return {**classified(), "labels": integers(VOCABULARY, BATCH, 4, seed=4)}


def spoken() -> dict[str, Tensor]:
    return {"input_features": random(BATCH, 6, 10), "labels": integers(VOCABULARY, BATCH, 4)}


def pictured(size: int = 8) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": random(BATCH, 3, size, size), "labels": integers(5, BATCH)}


def padded() -> dict[str, Tensor]:
    """Right-padded text with labels, as a classification head on a decoder wants it."""
    tokens = integers(VOCABULARY - 1, BATCH, LENGTH) + 1
    tokens[0, 3:] = 0
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": integers(2, BATCH)}


def causal(title: str, variant: str, options: dict[str, Any] | None = None, **model: Any) -> Row:
    """`model`: what `build` takes; the class's name if it is not the title."""
    return Row(title, variant, decoder(**{"name": title, **model}), llama_inputs, options or {})


WINDOWED: dict[str, Any] = {"head_dim": 6, "sliding_window": 3}
EXPERTS: dict[str, Any] = {"targets": QV, "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}

ROWS: tuple[Row, ...] = (
    causal("Llama", "all-linear, labels=", ONE_SIDED, scale=0.25),
    causal("Mistral", "all-linear, sliding window", sliding_window=3),
    causal("Qwen 2", "all-linear", SIGNS, name="Qwen2"),
    causal("Qwen 3", "all-linear", name="Qwen3", head_dim=6),
    causal("Gemma 2", "all-linear, sliding window", BOTH, name="Gemma2", **WINDOWED),
    causal("Gemma 3", "all-linear, sliding window", name="Gemma3", **WINDOWED),
    causal("Phi-3", "fused qkv_proj, gate_up_proj", BOTH, name="Phi3", targets=["qkv_proj", "gate_up_proj"]),
    causal("OLMo 2", "all-linear", name="Olmo2"),
    causal("StableLM", "all-linear", SIGNS, name="StableLm"),
    causal("GPT-2", "Conv1D, all", ONE_SIDED, name="GPT2", head="LMHeadModel",
           targets=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True,
           sizes={"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16,
                  "bos_token_id": 1, "eos_token_id": 2}),
    causal("GPT-NeoX", "fused query_key_value, all-linear", name="GPTNeoX", sizes=ENCODER),
    causal("BLOOM", "fused query_key_value, all-linear", BOTH, name="Bloom",
           sizes={"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    causal("OPT", "all-linear", SIGNS, name="OPT",
           sizes={"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    causal("Mamba", "in_proj, x_proj", name="Mamba", targets=["in_proj", "x_proj"],
           sizes={"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    Row("Mixtral", "q, v; grouped experts (default)", decoder("Mixtral", QV, num_local_experts=4), llama_inputs),
    Row("Mixtral", "q, v; batched_mm experts",
        decoder("Mixtral", QV, num_local_experts=4, experts_implementation="batched_mm"), llama_inputs),
    Row("Mixtral", "q; LoRA on the experts, both factors", decoder("Mixtral", ["q_proj"], num_local_experts=4,
        num_hidden_layers=1, target_parameters=["experts.gate_up_proj", "experts.down_proj"]), llama_inputs, BOTH),
    causal("Qwen 2 MoE", "q, v; shared expert", BOTH, name="Qwen2Moe", **EXPERTS, moe_intermediate_size=12,
           shared_expert_intermediate_size=10),
    causal("Qwen 3 MoE", "q, v", SIGNS, name="Qwen3Moe", **EXPERTS, moe_intermediate_size=12, head_dim=6),
    causal("OLMoE", "q, v", ONE_SIDED, name="Olmoe", **EXPERTS),
    causal("gpt-oss", "q, v; attention sinks", name="GptOss", targets=QV, num_hidden_layers=1, num_local_experts=4,
           num_experts_per_tok=2, head_dim=6),
    causal("DeepSeek-V3", "latent attention, grouped routing", name="DeepseekV3", targets=["q_b_proj", "kv_b_proj"],
           num_hidden_layers=1, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
           topk_group=1, moe_intermediate_size=12, first_k_dense_replace=0, q_lora_rank=6, kv_lora_rank=6,
           qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6),
    causal("Llama 4", "complex rotations, tokens repeated for each expert", name="Llama4", sizes=LLAMA4,
           targets=["q_proj", "up_proj"]),
    Row("LLaVA", "all-linear; features where a mask is true", llava, looked_at),
    Row("Llama", "sequence classification", decoder("Llama", head="ForSequenceClassification"), padded, BOTH),
    Row("GPT-2", "sequence classification, score saved",
        decoder("GPT2", ["c_attn"], {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4,
                                     "n_positions": 16, "pad_token_id": 0},
                head="ForSequenceClassification", fan_in_fan_out=True, modules_to_save=["score"]), padded),
    Row("BERT", "sequence classification", decoder("Bert", ["query", "value"], ENCODER,
        head="ForSequenceClassification"), classified),
    Row("BERT", "token classification", decoder("Bert", ["query", "value"], ENCODER, head="ForTokenClassification"),
        tagged, SIGNS),
    Row("BERT", "question answering", decoder("Bert", ["query", "value"], ENCODER, head="ForQuestionAnswering"),
        answered, ONE_SIDED),
    Row("RoBERTa", "sequence classification", decoder("Roberta", ["query", "value"], {**ENCODER, "pad_token_id": 0},
        head="ForSequenceClassification", max_position_embeddings=32), classified, BOTH),
    Row("DistilBERT", "sequence classification", decoder("DistilBert", ["q_lin", "v_lin", "lin1"],
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 4},
        head="ForSequenceClassification"), classified),
    Row("DeBERTa v2", "sequence classification, problem_type given", decoder("DebertaV2", ["query_proj", "value_proj"],
        DEBERTA, head="ForSequenceClassification", problem_type="single_label_classification"), classified),
    Row("DeBERTa v2", "sequence classification, labels counted in Python", decoder("DebertaV2", ["query_proj"],
        DEBERTA, head="ForSequenceClassification"), classified,
        refused=Refusal(mz.CaptureError, "label_index.*set model.config.problem_type")),
    Row("RWKV", "writes its own weights", decoder("Rwkv", ["key", "value"], RWKV), llama_inputs,
        refused=Refusal(mz.CaptureError, r"changes its own state.*set model.config.rescale_every = 0")),
    Row("Longformer", "asks whether a token attends globally", decoder("Longformer", ["query", "value"],
        {**ENCODER, "attention_window": 4, "max_position_embeddings": 32, "pad_token_id": 0},
        head="ForSequenceClassification"), classified,
        refused=Refusal(mz.CaptureError, "is_global_attn.*dense attention")),
    Row("T5", "q, v; encoder and decoder", decoder("T5", ["q", "v"],
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2,
         "decoder_start_token_id": 0}, head="ForConditionalGeneration"), translated, ONE_SIDED),
    Row("Whisper", "q, v; encoder and decoder", decoder("Whisper", QV, WHISPER, head="ForConditionalGeneration"),
        spoken, SIGNS),
    Row("ViT", "query, value", decoder("ViT", ["q_proj", "v_proj", "query", "value"], IMAGES,
        head="ForImageClassification"), pictured()),
    Row("ResNet", "classifier; BatchNorm in eval mode", decoder("ResNet", ["classifier.1"],
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
        head="ForImageClassification"), pictured(16), BOTH),
    Row("ResNet", "convolutions", decoder("ResNet", ["convolution"],
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
        head="ForImageClassification"), pictured(16)),
    Row("ConvNeXt", "pointwise layers", decoder("ConvNext", ["pwconv1", "pwconv2"],
        {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "num_labels": 5}, head="ForImageClassification"),
        pictured(16), ONE_SIDED),
)  # fmt: skip
