"""The speedrun: the lowest loss that two CPU cores, or one GPU, reach in ten minutes.

    python prepare.py --input='corpus/*.train.jsonl.gz' --out_dir=data/train --tokenizer=bpe:16000
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 train.py config/speedrun.py

The rules, and the losses so far: records/speedrun/README.md. Two processes of one thread read
26,000 tokens a second, one process of two threads 21,000. On a GPU one process, larger shapes and
larger batches are better: put them behind this file, as --token_dim=512 --batch_size=128.
"""
out_dir = "out/speedrun"
data_dir = "data/train"
arch = "transformer"
copy_head = True
block_size = 128
n_layer = 1
n_head = 8
token_dim = 128
ffn_dim = 1585
masking_type = "token"
mlm_probability = 0.3
batch_size = 32  # 16 a process
micro_batch = 16
learning_rate = 5.6e-3
min_lr = 5e-5
warmup_steps = 200
max_minutes = 10.0
max_steps = 1000000  # never reached: max_minutes ends the run and its schedule
eval_interval = 1000
eval_rows = 512
health_rows = 0
log_interval = 100
save_minutes = 60.0
