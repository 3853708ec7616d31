"""Chat templates: a language model's own template, extended to messages with images and videos."""

from transformers import PreTrainedTokenizerBase

# Turns a message whose content is a list of items into one whose content is text, which is what the templates of
# language models expect; everything after it is the language model's template, untouched.
_FLATTEN_ITEMS = """\
{%- set storm = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is string or not message.content -%}
    {%- set storm.messages = storm.messages + [message] -%}
  {%- else -%}
    {%- set flat = namespace(text='') -%}
    {%- for item in message.content -%}
      {%- if item.type == 'image' -%}
        {%- set flat.text = flat.text + 'IMAGE_TOKEN' -%}
      {%- elif item.type == 'video' -%}
        {%- set flat.text = flat.text + 'VIDEO_TOKEN' -%}
      {%- elif item.type == 'text' -%}
        {%- set flat.text = flat.text + item.text -%}
      {%- else -%}
        {{- raise_exception('content items are of type text, image or video, got ' + item.type) -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set storm.messages = storm.messages + [dict(message, content=flat.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = storm.messages -%}
"""

# For language models that were never taught a chat format.
_PLAIN_CHAT = """\
{%- for message in messages -%}
{{- message.role | capitalize }}: {{ message.content }}{{ eos_token if message.role == 'assistant' else '' }}
{% endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""


def multimodal_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token: str = "<image>",
    video_token: str = "<video>",
    after_visual: str = "\\n",
) -> str:
    """Returns a template for messages with items of type text, image and video.

    Args:
        tokenizer: The language model's tokenizer; a plain ``User: ... Assistant:`` form is used if it has no template.
        image_token: Placeholder of images.
        video_token: Placeholder of videos.
        after_visual: What stands between a picture or video and what follows it, with Jinja's escapes.

    Returns:
        A Jinja template for `StormProcessor`.
    """
    flatten = _FLATTEN_ITEMS.replace("IMAGE_TOKEN", image_token + after_visual)
    flatten = flatten.replace("VIDEO_TOKEN", video_token + after_visual)
    own = tokenizer.chat_template
    return flatten + (own if isinstance(own, str) else _PLAIN_CHAT)
