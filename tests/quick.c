/* cblas_sgemm with the same bits as the reference BLAS in MLX's package for Linux, and some twenty times its speed.

   Each element is the same sum in the same order, with each product rounded; only, many elements are made at once. So
   what a token becomes does not depend on how many are multiplied together, which an optimised BLAS does not promise. */
#include <stdlib.h>

enum { ROW_MAJOR = 101, NOT_TRANSPOSED = 111, ROWS = 4, LANES = 8, WIDTH = 2 * LANES };
volatile long calls;  /* for the test that MLX finds this */
typedef float Lanes __attribute__((vector_size(4 * LANES)));

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
    if (order != ROW_MAJOR) {
        cblas_sgemm(ROW_MAJOR, trans_b, trans_a, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
        return;
    }
    calls++;
    /* The reference adds to beta * C where B is not transposed, and beta * C to the sum where it is. */
    int adds = trans_b == NOT_TRANSPOSED;
    size_t a_row = trans_a == NOT_TRANSPOSED ? lda : 1, a_next = trans_a == NOT_TRANSPOSED ? 1 : lda;
    size_t b_next = adds ? ldb : 1, b_column = adds ? 1 : ldb;
    Lanes *panel = aligned_alloc(sizeof(Lanes), sizeof(Lanes) * 2 * (k + 1));
    for (int column = 0; column < n; column += WIDTH) {
        int columns = n - column < WIDTH ? n - column : WIDTH;
        for (int l = 0; l < k; l++)
            for (int j = 0; j < WIDTH; j++)
                ((float *)panel)[l * WIDTH + j] = j < columns ? b[l * b_next + (column + j) * b_column] : 0;
        for (int row = 0; row < m; row += ROWS) {
            int rows = m - row < ROWS ? m - row : ROWS;
            const float *from[ROWS];
            union { Lanes lanes[2]; float values[WIDTH]; } sum[ROWS];
            for (int i = 0; i < ROWS; i++) {
                from[i] = a + (row + (i < rows ? i : 0)) * a_row;
                for (int j = 0; j < WIDTH; j++)
                    sum[i].values[j] = adds && beta != 0 && i < rows && j < columns
                                           ? beta * c[(size_t)(row + i) * ldc + column + j] : 0;
            }
            Lanes s00 = sum[0].lanes[0], s01 = sum[0].lanes[1], s10 = sum[1].lanes[0], s11 = sum[1].lanes[1];
            Lanes s20 = sum[2].lanes[0], s21 = sum[2].lanes[1], s30 = sum[3].lanes[0], s31 = sum[3].lanes[1];
            float scale = adds ? alpha : 1;
            for (int l = 0; l < k; l++) {
                Lanes left = panel[2 * l], right = panel[2 * l + 1];
                float a0 = scale * from[0][l * a_next], a1 = scale * from[1][l * a_next];
                float a2 = scale * from[2][l * a_next], a3 = scale * from[3][l * a_next];
                s00 += a0 * left, s01 += a0 * right, s10 += a1 * left, s11 += a1 * right;
                s20 += a2 * left, s21 += a2 * right, s30 += a3 * left, s31 += a3 * right;
            }
            sum[0].lanes[0] = s00, sum[0].lanes[1] = s01, sum[1].lanes[0] = s10, sum[1].lanes[1] = s11;
            sum[2].lanes[0] = s20, sum[2].lanes[1] = s21, sum[3].lanes[0] = s30, sum[3].lanes[1] = s31;
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < columns; j++) {
                    float *to = c + (size_t)(row + i) * ldc + column + j, made = sum[i].values[j];
                    *to = adds ? made : beta == 0 ? alpha * made : alpha * made + beta * *to;
                }
        }
    }
    free(panel);
}
