"""What nnU-Net needs to see of the sites: raw data sets of the sources, and folders of images to segment."""

from __future__ import annotations

import json

from desam_nnunet.cross_site.study import Study
from desam_nnunet.system.files import replace_file


def write_links(study: Study) -> None:
    """The images of every site under nnU-Net's names, as links, or copies where links can't be made."""
    ending = study.dataset_json["file_ending"]
    for site, cases in study.sites.items():
        study.images(site).mkdir(parents=True, exist_ok=True)
        for case in cases:
            for channel, image in enumerate(case.images):
                link = study.images(site) / f"{case.name}_{channel:04d}{ending}"
                if link.exists():
                    continue
                link.unlink(missing_ok=True)
                try:
                    link.symlink_to(image)
                except OSError:
                    replace_file(link, [image.read_bytes()])


def write_dataset(study: Study, source: str) -> None:
    """The raw data set of one source: a description that names its files where they are, and no other site's."""
    raw = study.folder("nnUNet_raw") / study.datasets[source]
    raw.mkdir(parents=True, exist_ok=True)
    cases = {case.name: {"images": [str(path) for path in case.images], "label": str(case.label)}
             for case in study.sites[source]}
    content = study.dataset_json | {"numTraining": len(cases), "dataset": cases}
    replace_file(raw / "dataset.json", [json.dumps(content, indent=4).encode()])
