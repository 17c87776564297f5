"""transformers and TRL, used as their documentation recommends: the other side of side_by_side.py.

Shapes: N prompts, K responses per prompt. Token lists go in and come out, as in generate.py and judges/pairrm.py.
"""

import itertools
import os
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # their bars; ours has been made by then, or is off in a child

import datasets
import torch
import transformers
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

datasets.disable_caching()  # reference log-probabilities of one repeat would be found on disk in the next
datasets.disable_progress_bars()
datasets.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def load_policy(folder):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.no_grad()
def sample(model, prompts, samples_per_prompt, max_new_tokens, stop_token, together, temperature=1.0):
    """N lists of K responses, from left-padded batches of `together` prompts; stop_token None: all of max_new_tokens."""
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_return_sequences=samples_per_prompt,
        max_new_tokens=max_new_tokens, eos_token_id=stop_token, pad_token_id=stop_token or 0,
    )  # fmt: skip
    model.generation_config = settings  # else the checkpoint's own end token fills in for None
    responses = []
    for start in range(0, len(prompts), together):
        batch = prompts[start : start + together]
        T = max(map(len, batch))
        tokens = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in batch])
        rows = model.generate(tokens, attention_mask=mask, generation_config=settings)[:, T:].tolist()
        responses += [row[: row.index(stop_token) + 1] if stop_token in row else row for row in rows]
    return [responses[start : start + samples_per_prompt] for start in range(0, len(responses), samples_per_prompt)]


class CrossEncoder:
    """PairRM from transformers' DebertaV2Model, head and pair format as on the model card of llm-blender/PairRM-hf."""

    def __init__(self, folder):
        self.config = transformers.DebertaV2Config.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder = transformers.DebertaV2Model(self.config).eval()
        D = self.config.hidden_size
        self.head = torch.nn.Sequential(torch.nn.Linear(2 * D, D), torch.nn.Tanh(), torch.nn.Linear(D, 1))
        weights = load_file(f"{folder}/model.safetensors")
        prefix, names = "pretrained_model.", {"0": "head_layer.1", "2": "head_layer.4"}
        self.encoder.load_state_dict({key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)})
        self.head.load_state_dict({f"{n}.{part}": weights[f"{name}.{part}"] for n, name in names.items()
                                   for part in ("weight", "bias")})  # fmt: skip

    def pair_ids(self, prompt, first, second, source_limit=1224, candidate_limit=412):
        encode = self.tokenizer.encode
        source = encode("<|source|>" + prompt, max_length=source_limit, truncation=True)
        room = (source_limit + 2 * candidate_limit - len(source)) // 2
        parts = zip(("<|candidate1|>", "<|candidate2|>"), (first, second))
        return source + [token for mark, text in parts for token in encode(mark + text, max_length=room, truncation=True)]

    def forward(self, rows):
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")  # with its attention mask
        hidden, config = self.encoder(**batch).last_hidden_state, self.config
        marks = (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)
        source, first, second = (hidden[batch["input_ids"] == mark] for mark in marks)
        return (self.head(torch.cat([source, first], -1)) - self.head(torch.cat([source, second], -1)))[:, 0]

    @torch.no_grad()
    def logits_many(self, prompts, responses, together):
        """(N, K, K), 0 on the diagonal, of `together` ordered pairs at a time in the order in which they come."""
        K = len(responses[0])
        places = [(n, i, j) for n in range(len(prompts)) for i, j in itertools.permutations(range(K), 2)]
        logits = torch.zeros(len(prompts), K, K)
        for start in range(0, len(places), together):
            batch = places[start : start + together]
            rows = [self.pair_ids(prompts[n], responses[n][i], responses[n][j]) for n, i, j in batch]
            logits[tuple(zip(*batch))] = self.forward(rows)
        return logits


class Classifier:
    """A scalar head on a chat model's last token: what LlamaForSequenceClassification and its relatives are."""

    def __init__(self, folder, head):
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.model = load(folder, num_labels=1, dtype=torch.float32, attn_implementation="sdpa", pad_token_id=0).eval()
        self.model.score.weight.data = head
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def preferences_many(self, prompts, responses, together):
        """(N, K, K), of `together` right-padded texts at a time in the order in which they come."""
        chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
                 for prompt, row in zip(prompts, responses) for response in row]  # fmt: skip
        texts = [self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        scores = [self.scores(rows[start : start + together]) for start in range(0, len(rows), together)]
        score = torch.cat(scores).view(len(prompts), -1)
        return torch.sigmoid(score[:, :, None] - score[:, None])

    def scores(self, rows):
        T = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
        return self.model(tokens, attention_mask=mask).logits[:, 0]


def with_terms(model, rank, alpha):
    """A model with peft's LoRA terms beside all linear layers but the head."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


class Trainer(DPOTrainer):
    """DPOTrainer on token ids: the tokenization that it would do first is done already, to its gain. `seconds` counts the
    reference log-probabilities that are computed while it is built."""

    seconds = 0.0

    def _prepare_dataset(self, dataset, *arguments):
        return dataset

    def _precompute_ref_logps(self, *arguments):
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments)
        self.seconds += time.perf_counter() - start
        return dataset


def make_trainer(model, out, pairs, beta, lr, micro_batch, precompute=False, recompute=False):
    """A DPOTrainer with sppo_hard on pairs (prompt, chosen, rejected) of token ids: an epoch of one optimizer step."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    settings = DPOConfig(
        str(out), loss_type="sppo_hard", beta=beta, optim="rmsprop", learning_rate=lr, weight_decay=0.0,
        lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0, num_train_epochs=1, max_length=None,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=-(-len(pairs) // micro_batch),
        precompute_ref_log_probs=precompute, gradient_checkpointing=recompute, bf16=False, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = datasets.Dataset.from_dict(dict(zip(names, map(list, zip(*pairs)))))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)
    trainer = Trainer(model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(trainer):
    """Seconds of training, the precomputed part included."""
    start = time.perf_counter()
    trainer.train()
    return trainer.seconds + time.perf_counter() - start
