"The network: a torchvision or timm body and a head."
