"""The engine: fine-tune a pretrained image classifier, computing what does not train once.

Importing this imports neither torch nor timm. It makes `timm.create_model("finetune_figure1")` work, whichever of the
two packages is imported first.
"""

from finetune.registration import register_networks

register_networks()
