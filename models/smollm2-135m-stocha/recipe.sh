#!/usr/bin/env bash
# Makes this adapter anew (`make model`): text, training, measurements, model card. Every step goes on where it was
# stopped. Two cores need about a quarter of an hour for the text, an hour for the training and ten minutes for the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=models/smollm2-135m-stocha
build=${BUILD:-build/model}
corpus=$build/corpus
kinds=(technical narrative essay chat)

echo "==> Conversations that the model writes itself"
python -m training.self_generation --output "$build/chats.jsonl" --count 766
echo "==> Text from Debian packages"
python -m training.corpus --output "$corpus" --packages "$build/packages" --chats "$build/chats.jsonl"

echo "==> Training"
texts=() held_out=() measured=()
for kind in "${kinds[@]}"; do
    texts+=(--text "$corpus/$kind/train")
    held_out+=(--held-out "$corpus/$kind/held_out")
    measured+=("$corpus/$kind/held_out")
done
siluette tune --output "$build/run" "${texts[@]}" "${held_out[@]}" \
    --method stocha --p relu=0.45,silu=0.3,uniform=0.25 --alpha 0 --distillation 1 --gate-l1 0.1 \
    --train lora --lora-rank 96 --lora-alpha 192 --learning-rate 1.2e-3 --warmup-steps 20 \
    --steps 720 --batch-size 8 --sequence-length 256 --eval-every 180 --eval-tokens 2048 --save-every 100

echo "==> Measuring"
evaluate=(siluette eval perplexity "${measured[@]}" --context 512 --max-tokens 4096 --dtype float32)
"${evaluate[@]}" --adapter none --activation silu --json "$build/untouched.json"
"${evaluate[@]}" --adapter "$build/run" --json "$build/perplexity.json" --plot "$build/perplexity.svg"
siluette eval sparsity "${measured[@]}" --context 512 --max-tokens 4096 --adapter "$build/run" \
    --json "$build/sparsity.json" --plot "$build/sparsity.svg"

cp "$build/run/adapter_config.json" "$build/run/adapter_model.safetensors" "$build/run/training.svg" "$folder/"
cp "$build"/{untouched,perplexity,sparsity}.json "$build"/{perplexity,sparsity}.svg "$folder/"
python -m training.model_card --build "$build" --output "$folder"
