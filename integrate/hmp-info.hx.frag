
#if defined(CONFIG_DEDUP_SHARE)
    {
        .name       = "dedup",
        .args_type  = "",
        .params     = "",
        .help       = "show what the dedup-share filter nodes have shared",
        .flags      = "p",
    },
#endif

SRST
  ``info dedup``
    Show what the dedup-share filter nodes have shared.
ERST
