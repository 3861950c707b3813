"""Hugging Face folders and hub names, in and out, without torch and without running any of their code."""

from qstar_jax.hub.folder import open_folder as open_folder
from qstar_jax.hub.folder import read_config as read_config
from qstar_jax.hub.folder import read_tokenizer as read_tokenizer
from qstar_jax.hub.peft import is_adapter as is_adapter
from qstar_jax.hub.peft import read_adapter as read_adapter
from qstar_jax.hub.peft import read_base_name as read_base_name
from qstar_jax.hub.peft import read_lora as read_lora
from qstar_jax.hub.peft import write_adapter as write_adapter
from qstar_jax.hub.reader import read_params as read_params
from qstar_jax.hub.writer import write_folder as write_folder
