"""The reading half of the Hub: what a repository holds at one commit, its files' headers, and its files.

``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` mean what they mean to ``huggingface_hub``,
whose cache this is. Whatever goes wrong is one ``HubError`` of one line.
"""
