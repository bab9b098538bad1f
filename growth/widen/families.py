"""What widening must know of an architecture (data).

Every family here was widened with random weights and compared with its model by
tests/growth/widen/test_families.py: one that is not here may multiply its stream by a number that
depends on its width, or tell its heads apart by their position.
"""

# Their norms multiply by one plus what is stored, and they multiply the embedding by the square
# root of the width.
GEMMAS = frozenset({"gemma", "gemma2", "gemma3_text", "vaultgemma"})
# Their head is the embedding where the config does not say.
TIED_UNTOLD = GEMMAS | {
    "bert", "cohere", "cohere2", "cohere2_moe", "ernie", "ernie4_5", "gpt2", "granite_swa",
    "megatron-bert", "smollm3", "starcoder2",
}  # fmt: skip

EXACT = GEMMAS | {
    "arcee", "bert", "cohere", "cohere2", "cohere2_moe", "cwm", "ernie", "ernie4_5", "exaone4",
    "flex_olmo", "glm", "glm4", "gpt2", "gpt_neox", "granite", "granite_swa", "helium",
    "internlm3", "iquestcoder", "jais2", "llama", "megatron-bert", "mellum", "ministral3",
    "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
