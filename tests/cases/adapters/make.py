"""Adapter files that people have, for the embedded SD3 pipeline: python make.py FOLDER.

norm_out      our own targets `attn.to_q` and `norm_out.linear` (ComfyUI's key map has three-part keys there)
diff_b        a LoRA and a bias difference, as ComfyUI's own "Extract and Save Lora" writes it
renamed       diffusers' header (r 4, alpha 8: strength 2), keys renamed as forums advise
old_names     `.lora.down` / `.lora.up`, as diffusers wrote in 2023
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(0)
query = "transformer_blocks.0.attn.to_q"
down, up = torch.randn(4, 128, generator=generator), torch.randn(128, 4, generator=generator)
header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
lora = {f"transformer.{query}.lora_A.weight": down, f"transformer.{query}.lora_B.weight": up}
norm = {
    "transformer.norm_out.linear.lora_A.weight": torch.randn(4, 128, generator=generator),
    "transformer.norm_out.linear.lora_B.weight": torch.randn(256, 4, generator=generator),
}
save_file(lora | norm, out / "norm_out.safetensors")
save_file(
    lora | {"transformer.transformer_blocks.0.attn.to_out.0.diff_b": torch.zeros(128)}, out / "diff_b.safetensors"
)
renamed = {key.replace("transformer.", "base_model.model.", 1): value for key, value in lora.items()}
save_file(renamed, out / "renamed.safetensors", metadata=header)
old = {f"transformer.{query}.lora.down.weight": down, f"transformer.{query}.lora.up.weight": up}
save_file(old, out / "old_names.safetensors")
