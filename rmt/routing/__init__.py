"""Routing functions for low-rank vision-language tuning (Qu et al., ECCV 2024): routed LoRA and routed adapters."""

from .config import RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .functions import FUNCTIONS, matrix, route
from .hosts import Block, Host, Site, describe
from .inject import Routed, inject_routed_adapter, inject_routed_lora, load_routed

__all__ = [
    "FUNCTIONS", "Block", "Host", "Routed", "RoutedAdapterConfig", "RoutedConfig", "RoutedLoRAConfig", "Site",
    "describe", "inject_routed_adapter", "inject_routed_lora", "load_routed", "matrix", "route",
]  # fmt: skip
