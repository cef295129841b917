"""Routing functions for low-rank vision-language tuning (Qu et al., ECCV 2024): routed LoRA and routed adapters."""

from .bart import CLIPBart
from .config import RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .extras import trainable_extras
from .functions import FUNCTIONS, matrix, route
from .hf import ViTGPT2, ViTRoberta
from .hosts import Block, Host, Site, describe
from .inject import Routed, inject_routed_adapter, inject_routed_lora, load_routed

__all__ = [
    "FUNCTIONS", "Block", "CLIPBart", "Host", "Routed", "RoutedAdapterConfig", "RoutedConfig", "RoutedLoRAConfig",
    "Site", "ViTGPT2", "ViTRoberta", "describe", "inject_routed_adapter", "inject_routed_lora", "load_routed", "matrix",
    "route", "trainable_extras",
]  # fmt: skip
