#!/usr/bin/env bash
# Siluette with nothing but curl: the model, one prompt in all three modes, a streamed chat, an error.
# Usage: curl.sh [BASE_URL]
set -euo pipefail

base_url=${1:-${SILUETTE_BASE_URL:-http://127.0.0.1:8000}}

post() { # path, body
    curl --silent --show-error --no-buffer "$base_url$1" --header 'Content-Type: application/json' --data "$2"
    echo
}

echo '== Which activations does the model support?'
curl --silent --show-error --fail "$base_url/v1/models"
echo

for activation in '{"mode": "silu"}' '{"mode": "stochastic", "p": 0.7, "seed": 1}' '{"mode": "relu"}'; do
    echo "== $activation"
    post /v1/completions '{"prompt": "The best thing about the moon is", "max_tokens": 12, "temperature": 0,
        "activation": '"$activation"'}'
done

echo '== Streamed'
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Name a planet."}], "max_tokens": 8,
    "seed": 7, "stream": true, "stream_options": {"include_usage": true}}'

echo '== An error names its field'
post /v1/completions '{"prompt": "Hello", "activation": {"mode": "stochastic", "p": 1.5}}'
