"""A small merging byte-level tokenizer, and chat templates written in the documented shape of each family."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = (
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
)
_LINES = [
    "The answer is a yes and a no. What is the weather in the city of Paris today?",
    '{"intent": "GetWeather", "city": "Paris"} user assistant system tool question answer',
    "hello there, how are you? I am fine, thank you. a b c d e f g: one two three",
] * 20

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"
_CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_CHATML_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

CHATML = _LOOP + _CHATML_TURN + _END + _CHATML_OPEN
CHATML_DEFAULT = (
    _LOOP
    + "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a bot<|im_end|>\n' }}{% endif %}"
    + _CHATML_TURN
    + _END
    + _CHATML_OPEN
)
CHATML_MARKERS = (
    _LOOP + "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + _CHATML_TURN + "{% endif %}" + _END + _CHATML_OPEN
)
CHATML_STRIP = CHATML.replace("m['content']", "m['content'] | trim")
CHATML_NO_END = CHATML.replace("<|im_end|>", "")
CHATML_END_LAST = (
    _LOOP
    + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<|im_end|>' }}{% endif %}" + _END + _CHATML_OPEN
)
MERGING = (
    _LOOP + "{% if loop.first or messages[loop.index0 - 1]['role'] != m['role'] %}"
    "{% if not loop.first %}{{ '<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% else %}{{ '\n\n' }}{% endif %}{{ m['content'] }}{% if loop.last %}{{ '<|im_end|>\n' }}{% endif %}"
    + _END
    + _CHATML_OPEN
)
LLAMA3 = (
    "{{ bos_token }}"
    + _LOOP
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim) "
    "+ '<|eot_id|>' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set talk = messages[1:] %}{% else %}{% set sys = '' %}{% set talk = messages %}{% endif %}"
    "{% for m in talk %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') "
    "+ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}" + _END
)
MISTRAL = (
    "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}" + _END
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + _LOOP
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (m['content'] | trim) "
    "+ '<end_of_turn>\n' }}" + _END + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    _LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    _LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}" + _LOOP + "{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' "
    "+ m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{% set c = m['content'] %}{% set think = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or think) %}"
    "{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}{% if loop.first and c or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}" + _END + _CHATML_OPEN
)
FORCED_THINKING = QWEN3.replace(
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}",
    "add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}",
)
JOINED_ARGUMENTS = QWEN3.replace("(call.function | tojson)", "call.function.name + call.function.arguments")


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return str(tokenizer.to_str())


def family(
    template: str | None,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str = "<pad>",
    trim_offsets: bool = True,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer with this chat template; `trim_offsets` as GPT-2 (True) and Llama 3 (False) have it."""
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast
