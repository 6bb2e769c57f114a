// Cooperative matrices of 8 x 8, operands and sums f32: Metal's simdgroup_float8x8. They hold weights of every type.

alias Operand = f32;
alias Left = coop_mat8x8<f32, A>;
alias Right = coop_mat8x8<f32, B>;
alias Sums = coop_mat8x8<f32, C>;
const SIDE = 8u;
