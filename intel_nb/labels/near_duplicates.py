import numpy as np
def image_hash(image):
    return np.zeros(4, np.uint64)
def near_groups(hashes):
    return np.arange(len(hashes))
