"""How a model lies on devices: mesh, layouts, the derived matmul, and the Context that layers see."""
