"""Maximum-weight matching of a bipartite graph, by the Hungarian method."""
import numpy as np


def best_matching(weight: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (row, column), by row, of a matching whose sum of weights is the largest.

    weight: (n, m) floats, 0 where there is no edge. O(n² m) time, n the smaller side.

    Rows enter one at a time. Each takes the path of least reduced cost, which is
    cost[i, j] - u[i] - v[j], from itself to a free column, and the matches along that path move
    over by one. Row 0 and column 0 are put in front and stand for "none".
    """
    if len(weight) > weight.shape[1]:
        return sorted((i, j) for j, i in best_matching(weight.T))
    n, m = weight.shape
    cost = np.pad(-weight, ((1, 0), (1, 0)))            # (n + 1, m + 1)
    u = np.zeros(n + 1)                                 # the dual variables of rows and columns
    v = np.zeros(m + 1)
    row = np.zeros(m + 1, int)                          # row[j]: the row matched to column j
    for i in range(1, n + 1):
        row[0] = i
        distance = np.full(m + 1, np.inf)               # of the shortest path known to each column
        previous = np.zeros(m + 1, int)                 # the column before it on that path
        done = np.zeros(m + 1, bool)

        # Dijkstra's algorithm from row i, until it reaches a column that no row holds
        j = 0
        while row[j]:
            done[j] = True
            reduced = cost[row[j]] - u[row[j]] - v
            closer = ~done & (reduced < distance)
            distance[closer] = reduced[closer]
            previous[closer] = j
            j = int(np.argmin(np.where(done, np.inf, distance)))
            step = distance[j]
            u[row[done]] += step
            v[done] -= step
            distance[~done] -= step

        # along the path each column takes the row of the one before it
        while j:
            row[j] = row[previous[j]]
            j = previous[j]
    pairs = [(int(row[j]) - 1, j - 1) for j in range(1, m + 1) if row[j]]
    return sorted(pair for pair in pairs if weight[pair] > 0)
