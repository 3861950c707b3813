"""Reads and writes Hugging Face models, from folders or the Hub, without torch and without running their code."""

from qstar_jax.store.hub.folder import open_folder as open_folder
from qstar_jax.store.hub.folder import read_config as read_config
from qstar_jax.store.hub.generation import GENERATION as GENERATION
from qstar_jax.store.hub.generation import check_eos as check_eos
from qstar_jax.store.hub.generation import other_settings as other_settings
from qstar_jax.store.hub.generation import read_generation_config as read_generation_config
from qstar_jax.store.hub.generation import with_eos as with_eos
from qstar_jax.store.hub.generation import write_generation_config as write_generation_config
from qstar_jax.store.hub.peft import is_adapter as is_adapter
from qstar_jax.store.hub.peft import write_adapter as write_adapter
from qstar_jax.store.hub.peft_config import read_adapter_config as read_adapter_config
from qstar_jax.store.hub.peft_edits import read_edits as read_edits
from qstar_jax.store.hub.peft_merge import apply_edits as apply_edits
from qstar_jax.store.hub.peft_tokenizer import read_adapter_tokenizer as read_adapter_tokenizer
from qstar_jax.store.hub.reader import read_model as read_model
from qstar_jax.store.hub.reader import read_params as read_params
from qstar_jax.store.hub.shards import shard_bytes as shard_bytes
from qstar_jax.store.hub.tokenizer import build_tokenizer as build_tokenizer
from qstar_jax.store.hub.tokenizer import read_tokenizer as read_tokenizer
from qstar_jax.store.hub.tokenizer import tokenizer_files as tokenizer_files
from qstar_jax.store.hub.tokenizer import write_tokenizer as write_tokenizer
from qstar_jax.store.hub.writer import check_free as check_free
from qstar_jax.store.hub.writer import write_folder as write_folder
