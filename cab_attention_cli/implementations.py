"""`cab-attention implementations`: what works on this machine."""

from cab_attention_cli.mistakes import explained
from cab_attention_cli.output import new_console, print_table

# Name: (devices and dtypes, whether a cache can evict).
LIMITS = {
    "eager": ("any; N x N memory", "as eager_with_scores"),
    "sdpa": ("any", "no: gives no scores"),
    "flash_attention_2": ("NVIDIA GPU; float16, bfloat16", "no: gives no scores"),
    "cab": ("CPU: any dtype. NVIDIA GPU, compute capability 8.0: float16, bfloat16, float32; head dim to 256", "yes"),
}


@explained
def implementations() -> None:
    """Show the attention implementations: which work here, why others do not, and which can evict."""
    from cab_attention.attention import AttentionImplementation, why_unavailable

    rows = []
    for known in AttentionImplementation:
        reason = why_unavailable(known)
        rows.append((known.name, known.value, "no: " + reason if reason else "yes", *LIMITS[known.value]))
    columns = ("implementation", "name", "works here", "devices and dtypes", "can evict")
    print_table(new_console(), "Attention implementations", columns, rows)
