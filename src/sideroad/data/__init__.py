"""Sources → messages → tokens with a loss mask → batches, and a preview of what is trained on.

Import from the files: `config` (light), `dataset` (load_data), `batches`, `messages` (prompt_of), `template`
(encode_prompt), `findings` (refuse), `preview`.
"""
