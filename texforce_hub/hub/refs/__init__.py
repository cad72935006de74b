"""One grammar for naming things: adapters with their weights, stacks of them, rewards, tags in prompts.

::

    REF      = [NAME "="] SOURCE [":" WEIGHTS] [WINDOW]
    SOURCE   = local path | catalogue name | ["hf://"] owner "/" name ["@" revision] ["/" file]
    WEIGHTS  = number | part "=" number {"," part "=" number} | RAMP
    RAMP     = number "@" share {"," number "@" share}   weights at shares of the denoising steps
    WINDOW   = "[" start "-" end "]"                     fractions of the denoising steps
    STACK    = REF { ["+"] REF }                         split as a shell splits words
    REWARD   = NAME ["=" number]                         NAME may be a URL or python:module:function
    TAG      = "<lora:" NAME {":" number} ">"            inside a prompt; see generate/prompts

``parse`` and ``str`` are inverse. What exists on disk under exactly the written name is that thing, whatever
else the name could mean.
"""
