"""Ranks under a budget: what units offer (units), rules that choose (rules, d_rank_code, asvd), the integer program."""
