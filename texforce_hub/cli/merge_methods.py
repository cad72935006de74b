"""Merge methods, for ``--help`` without torch: by ``python -m texforce_hub.merge.methods.listing``."""

# fmt: off
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "cat": (
        "The exact sum Σ wᵢ Δᵢ; its rank is the sum of the ranks.",
        {
        },
    ),
    "svd": (
        "The exact sum Σ wᵢ Δᵢ at a chosen rank, with the share it keeps (the default).",
        {
        },
    ),
    "subtract": (
        "The first source minus the others: w₁ Δ₁ − Σ wᵢ Δᵢ, exactly.",
        {
        },
    ),
    "slerp": (
        "Spherical interpolation between two sources, layer by layer, exactly (Shoemake 1985).",
        {
            "length": "interpolated|chord, default interpolated",
        },
    ),
    "model_stock": (
        "The weighted sum, drawn towards the base by how much its sources disagree (arXiv 2403.19522).",
        {
        },
    ),
    "ties": (
        "Trim each change, elect each entry's sign, average the entries that agree (TIES, arXiv 2306.01708).",
        {
            "density": "a share in (0, 1], default 0.5",
            "trim": "layer|adapter, default layer",
            "majority": "mass|count, default mass",
            "election": "weighted|unweighted, default weighted",
            "normalize": "count|weights|none, default count",
            "space": "dense|core, default dense",
            "reference": "balanced|stored, default balanced",
        },
    ),
    "prune": (
        "The sum of the changes, each with only its largest entries by magnitude.",
        {
            "density": "a share in (0, 1], default 0.5",
            "trim": "layer|adapter, default layer",
            "space": "dense|core, default dense",
            "reference": "balanced|stored, default balanced",
        },
    ),
    "dare_linear": (
        "The sum of the changes, each with entries dropped at random and the rest rescaled (DARE, arXiv 2311.03099).",
        {
            "density": "a share in (0, 1], default 0.5",
            "rescale": "expectation|norm, default expectation",
            "space": "dense|core, default dense",
            "reference": "balanced|stored, default balanced",
        },
    ),
    "dare_ties": (
        "Entries dropped at random and rescaled (DARE), then signs elected and agreeing entries averaged (TIES).",
        {
            "density": "a share in (0, 1], default 0.5",
            "rescale": "expectation|norm, default expectation",
            "majority": "mass|count, default mass",
            "election": "weighted|unweighted, default weighted",
            "normalize": "count|weights|none, default count",
            "space": "dense|core, default dense",
            "reference": "balanced|stored, default balanced",
        },
    ),
    "tsv": (
        "The sources' leading singular vectors, made orthogonal to each other before they are summed (TSV-M).",
        {
            "share": "a share in (0, 1]",
        },
    ),
    "iso_c": (
        "The exact sum with all its singular values replaced by their mean (Iso-C, arXiv 2502.04959).",
        {
            "over": "rank|all, default rank",
        },
    ),
    "knots": (
        "TIES in the basis that all sources share (KnOTS, arXiv 2410.19735); rank at most the sum of the ranks.",
        {
            "density": "a share in (0, 1], default 0.5",
            "majority": "mass|count, default mass",
            "election": "weighted|unweighted, default weighted",
            "normalize": "count|weights|none, default count",
        },
    ),
}
