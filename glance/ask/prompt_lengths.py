"""Does an encoder see less of a prompt than was written? CLIP takes 77 tokens, most T5 512, and some know few words.

Only watched here, never changed: the pipeline encodes as it would. Lengths may be reported, a prompt's words may not.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase


class PromptLengths:
    """A watch on a pipeline's tokenizers: how many tokens they were given, and how many they kept.

    Most pipelines let a tokenizer cut; some cut what their `encode_prompt` returns to its `max_sequence_length`.
    """

    def __init__(self, pipe: DiffusionPipeline, say: Callable[[str], None]):
        self.say = say
        self.reported = set()  # lengths in tokens
        parts = {name: getattr(part, "tokenizer", part) for name, part in pipe.components.items()}  # or a processor's
        self.tokenizers = {name: part for name, part in parts.items() if isinstance(part, PreTrainedTokenizerBase)}
        self.unknown_to = set()  # names of tokenizers, as reported
        self.passed_on = dict.fromkeys(self.tokenizers, 0)  # the longest text that was not cut, in tokens

    def watch(self, pipe: DiffusionPipeline) -> None:
        """Call say(line) from now on when the pipeline cuts a prompt, once for each length that it cuts to, and when a
        tokenizer does not know most of one, once for each tokenizer.

        The line tells how many tokens are seen, and nothing of the prompt. To be called before `remember_prompts`.
        """
        for name, tokenizer in self.tokenizers.items():
            self._watch_tokenizer(name, tokenizer)
        method = getattr(pipe, "encode_prompt", None)
        if method and "max_sequence_length" in inspect.signature(method).parameters:
            pipe.encode_prompt = self._watched(method)

    def _report(self, name: str, most: int, tokens: int) -> None:
        """Say that a tokenizer, or the pipeline after it, keeps at most so many of a prompt's tokens."""
        if most not in self.reported:
            self.reported.add(most)
            self.say(f"A prompt is cut: {name} keeps {most} of its {tokens} tokens; what is beyond them is not seen")

    def _report_unknown(self, name: str, texts: list[list[int]], unknown: int) -> None:
        """Say that a tokenizer has no token for most of a text, of which it made its id `unknown`."""
        for ids in texts:
            missing = ids.count(unknown)
            if missing > len(ids) / 2 and name not in self.unknown_to:
                self.unknown_to.add(name)
                self.say(
                    f"{missing} of {len(ids)} tokens of a prompt are unknown to {name}, so its encoder sees little of "
                    "it; write it in the language and the letters of the model"
                )

    def _watch_tokenizer(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give this very tokenizer a class of its own, whose calls are compared with ones that may not cut."""
        kind = type(tokenizer)

        def call(tokenizer, *args, **kwargs):
            whole = {"truncation": False, "padding": False, "max_length": None, "return_tensors": None}
            tokens = count_tokens(kind.__call__(tokenizer, *args, **kwargs | whole))
            if tokenizer.unk_token_id is not None:
                plain = kind.__call__(tokenizer, *args, **kwargs | whole | {"add_special_tokens": False})
                self._report_unknown(name, id_lists(plain), tokenizer.unk_token_id)
            most = kwargs.get("max_length") or tokenizer.model_max_length
            if kwargs.get("truncation") not in (None, False, "do_not_truncate") and tokens > most:
                self._report(name, most, tokens)
            else:
                self.passed_on[name] = max(self.passed_on[name], tokens)
            return kind.__call__(tokenizer, *args, **kwargs)

        tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})

    def _watched(self, method):
        """Return `encode_prompt`, which then reports the tokens that its tokenizers passed on and that it dropped."""

        @functools.wraps(method)
        def encode_prompt(*args, **kwargs):
            result = method(*args, **kwargs)
            bound = inspect.signature(method).bind(*args, **kwargs)
            bound.apply_defaults()
            most = bound.arguments["max_sequence_length"]
            lengths = {leaf.shape[1] for leaf in tree_leaves(result) if torch.is_tensor(leaf) and leaf.ndim == 3}
            if most in lengths and most not in self.reported:
                self._compare(bound.arguments.get("prompt"), most)
            return result

        return encode_prompt

    def _compare(self, prompt, most: int) -> None:
        """Report the tokenizers that passed more than `most` tokens on, where that many are the prompt's own.

        Those of a template around the prompt do not count.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt or []
        for name in [name for name, tokens in self.passed_on.items() if tokens > most]:
            lengths = [
                count_tokens(self.tokenizers[name](text, add_special_tokens=False))
                for text in texts
                if isinstance(text, str)
            ]
            if max(lengths, default=0) > most:
                self._report(name, most, max(lengths))


def count_tokens(encoding) -> int:
    """Return the length in tokens of the longest text that was encoded."""
    return max(map(len, id_lists(encoding)), default=0)


def id_lists(encoding) -> list[list[int]]:
    """Return the ids of each text that was encoded."""
    ids = encoding["input_ids"]
    return ids if ids and isinstance(ids[0], list) else [ids]
