"""llama.cpp, the other side of `sample` in real.py: our checkpoint as a GGUF file, and a server that samples from it.

    python benchmarks/llama.py MODEL.gguf SLOTS THREADS CONTEXT

is what real.py starts, in an environment that has xllamacpp (llama.cpp's server and its binaries, from PyPI). Requests go to its
`/completion`: token ids in, token ids out, and all of them in one request.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_gguf(folder, path):
    """A float32 GGUF file of a llama with tied embeddings, the inverse of real/smollm2.py; tokens are those of `folder`."""
    sys.path.insert(0, str(ROOT))
    import gguf

    from data import Tokenizer
    from model import Transformer

    model, tokenizer = Transformer.from_pretrained(folder, "float32"), Tokenizer(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    words = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    control = {index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    kinds = [gguf.TokenType.CONTROL if index in control else gguf.TokenType.NORMAL for _, index in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # it is the embedding
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # of a rotated pair the two rows become neighbours
            weight = weight.view(-1, 2, config.head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Server:
    """A process with so many slots, each with room for so many positions."""

    def __init__(self, python, path, slots, threads, positions):
        command = [python, __file__, path, slots, threads, slots * positions]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process = subprocess.Popen([str(part) for part in command], **pipes)
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise OSError(f"llama.cpp with {slots} slots ended with exit code {self.process.wait()}")

    def sample(self, prompts, samples_per_prompt, max_new_tokens, temperature=1.0):
        """N lists of K responses, as peers.sample gives them; the stop token is that of the file."""
        rows = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        request = dict(
            prompt=rows, n_predict=max_new_tokens, temperature=temperature, samplers=["temperature"], return_tokens=True
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever the environment says
        with opener.open(f"{self.address}/completion", json.dumps(request).encode()) as answer:
            results = json.load(answer)
        responses = [result["tokens"] for result in sorted(results, key=lambda result: result["index"])]
        return [responses[start : start + samples_per_prompt] for start in range(0, len(rows), samples_per_prompt)]

    def peak(self):
        """Resident bytes, at most so far (Linux)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(path, slots, threads, context):
    """Print an address, and be there until the input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx = slots, context
    params.cache_ram_mib = 0  # else it keeps what finished requests have computed, up to 8 GB
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
