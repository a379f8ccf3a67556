"""``desam cross-site``: train on each site, segment the others, score and report, with Snakemake beneath."""
