"""Token vectors from co-occurrence: symmetric SVD of positive PMI, 20 M tokens, half a minute. For pilot.py spec=..."""
import os, sys; sys.path.insert(0, os.getcwd())
import numpy as np, torch, time
torch.set_num_threads(2)
from shards import TokenData
from tokenizer import Tokenizer
D="data/corpus"; tok=Tokenizer.load(D+"/tokenizer"); V=tok.vocab_size
tr=TokenData(D,"train",512,0); t=time.time()
n=40000; ids=torch.as_tensor(tr.block(np.arange(n))).reshape(-1).numpy().astype(np.int64)  # 20M tokens
C=np.zeros(V*V,np.float32)
for off,w in ((1,1.),(2,1.),(3,.7),(4,.5),(5,.5),(6,.3)):
    for part in np.array_split(np.arange(len(ids)-off),4):
        code=ids[part]*V+ids[part+off]; u,c=np.unique(code,return_counts=True); C[u]+=w*c
    print(off,time.time()-t,flush=True)
C=torch.from_numpy(C).view(V,V); C=C+C.T
tot=C.sum(); r=C.sum(1)
P=torch.log((C*tot/(r[:,None]*(r[None]**.75*(r.sum()/ (r**.75).sum()))).clamp(min=1e-9)).clamp(min=1)).nan_to_num(0,0,0)
print("nnz",(P>0).float().mean(),time.time()-t)
g=torch.Generator().manual_seed(0); Q=torch.randn(V,300,generator=g)
for _ in range(4): Q,_=torch.linalg.qr(P@Q)
B=Q.T@P@Q; e,W=torch.linalg.eigh((B+B.T)/2); o=e.abs().argsort(descending=True)[:256]
U=Q@W[:,o]*e[o].abs().sqrt(); print("svd",time.time()-t,e[o][:5],e[o][-3:])
torch.save(U,"out/pilot/spectral.pt")
def nn(w):
    i=[int(x) for x in tok.encode([w])[0] if not tok.is_special[x]][0]; N=torch.nn.functional.normalize(U[:,:128],dim=-1); return w,[tok.decode([int(j)]) for j in (N@N[i]).topk(8).indices if int(j)<tok.n_vocab]
for w in (" king"," river"," seven"," Paris"," said"): print(nn(w))
