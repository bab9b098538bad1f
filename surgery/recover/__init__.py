"""Healing after surgery: a model is trained on, alone or with its parent as the teacher."""
