"""Random Hugging Face hosts that take milliseconds. Widths are 32, images 16 x 16, words 24; no dropout."""

from pathlib import Path

import torch
import transformers

from rmt.routing import CLIPBart, RoutedLoRAConfig, ViTGPT2, ViTRoberta, inject_routed_adapter, inject_routed_lora

WIDTH, WORDS, PAD, ANSWERS, FEATURES = 32, 24, 1, 6, 10
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {**SMALL, **PLAIN, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, "initializer_range": 0.5}
GPT2 = {
    "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 20, "bos_token_id": 0,
    "eos_token_id": 2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.3,
}  # fmt: skip
ROBERTA = {
    **SMALL, **PLAIN, "vocab_size": WORDS, "max_position_embeddings": 20, "pad_token_id": PAD, "type_vocab_size": 1,
    "initializer_range": 0.3,
}  # fmt: skip
BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": WORDS,
    "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    "dropout": 0.0, "max_position_embeddings": 30, "init_std": 0.3,
}  # fmt: skip
HOSTS = ("gpt2", "roberta", "bart")
SITES = {"gpt2": ("self.q", "self.v"), "roberta": ("self.q", "self.v"), "bart": ("self.q", "self.v", "cross.q")}


def vit(**other):
    return transformers.ViTModel(transformers.ViTConfig(**{**VIT, **other}))


def gpt2(**other):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **other}))


def roberta(**other):
    return transformers.RobertaModel(transformers.RobertaConfig(**{**ROBERTA, **other}))


def bart(**other):
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**{**BART, **other}))


def host(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **options):
    """A host in eval mode."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        model = ViTGPT2(vit(), gpt2(), **options)
    elif kind == "roberta":
        model = ViTRoberta(vit(), roberta(), ANSWERS, **options)
    else:
        model = CLIPBart(bart(), features=FEATURES, **options)
    return model.to(dtype).eval()


def injected(kind, function="mul", config=RoutedLoRAConfig, **options):
    """A host with random routed parts, which do something; and these."""
    model = host(kind, **options)
    if config is RoutedLoRAConfig:
        routed = inject_routed_lora(model, config(function=function, r=4, sites=SITES[kind]))
    else:
        routed = inject_routed_adapter(model, config(function=function, r=4))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in routed.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=random, dtype=p.dtype))
    return model, routed


def batch(kind: str, size: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict:
    """A host's arguments: images, 5 tokens of which one sample has 2 of padding, and labels."""
    random = torch.Generator().manual_seed(seed)
    shape = (size, 4, FEATURES) if kind == "bart" else (size, 3, 16, 16)
    image = torch.randn(shape, generator=random, dtype=dtype)
    ids = torch.randint(3, WORDS, (size, 5), generator=random)
    ids[0, 3:] = PAD
    labels = torch.randint(3, WORDS, (size, 5), generator=random)
    if kind == "roberta":
        labels = torch.rand(size, ANSWERS, generator=random, dtype=dtype)
    return {"image": image, "input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


# What text_tools writes, behind <s>, <pad>, </s> and <unk>, of which GPT-2 has no <pad>: "!" is in its place.
SAID = ["A", "the", "whole", "picture", "is", "wall", ".", "red", "green", "blue", "grey", "What", "colour", "it", "?"]


def folders(root: Path, seed: int = 0) -> dict[str, str]:
    """Checkpoints of vit, gpt2 and roberta with processor and tokenizers, as --vision and --text take them."""
    torch.manual_seed(seed)
    made = {"vit": vit(), "gpt2": gpt2(), "roberta": roberta()}
    for name, model in made.items():
        model.eval().save_pretrained(root / name)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    tokenizer("!").save_pretrained(root / "gpt2")
    tokenizer("<pad>", ends=True, pad_token="<pad>").save_pretrained(root / "roberta")
    return {name: str(root / name) for name in made}


def tokenizer(second: str, ends: bool = False, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    """Of whole words. ends: put <s> and </s> around a text, as RoBERTa's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["<s>", second, "</s>", "<unk>", *SAID])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
