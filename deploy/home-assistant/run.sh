#!/bin/sh
# Starts the server with the add-on's options.
set -eu
data=${DATA:-/data} config=${CONFIG:-/config}
eval "$(jq -r 'to_entries[] | select(.value != null and .value != "") | @sh "export BVIT_\(.key | ascii_upcase)=\(.value)"' "$data/options.json")"
mkdir -p "$data/store"
[ -e "$config/cameras.toml" ] || echo '# Cameras and the MQTT broker; the documentation of the add-on says how.' >"$config/cameras.toml"
export BVIT_MODEL_STORE="$data/store" BVIT_EXAMPLES="$data/store/examples"
export BVIT_CAMERAS="$config/cameras.toml" BVIT_ADMIN_KEY_OUT="$config/admin-key"
exec butterflyvit serve
