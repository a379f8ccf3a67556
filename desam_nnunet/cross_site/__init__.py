"""``desam cross-site``: train on each site, segment the others, score and report, one resumable step after another."""
