"""The books of the trellis code, as ``scripts/trellis_books.py`` derives them.

``TYPICAL_ERRORS`` are the relative errors that no plane and one to eight planes leave of the sample that they were
trained on, deltas of variance one within each group.
"""

import base64
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.trellis import PLANES, STATES

TYPICAL_ERRORS: Final = (1.0000, 0.5312, 0.2827, 0.1513, 0.0821, 0.0459, 0.0274, 0.0185, 0.0143)

_TEXT: Final = (
    "000F1*cMg!3k(?a&IDQNP5goui}p$gL-NxF?Aq)9&<v{gZU=Gmya1IVPx%%O;qwLwC+I>1N)pTYPYaOrLj`c`#Q~2W-1)i=2l3?vlI;-#L"
    "=D>by9=fFs0O3wulx@e6#B9Y{Pe2_!Rtc*V+_mqv<MyYJOTmapZcp3NAxxdD)KV~geQyq_z5%hv<Cq2?*IxOhx&~YeDUW8HtpmF`VQ3lM-"
    "GShLj@J<008qBH2GZ&2J!|6!RoO9O%NXWX$NiYsR4iIX#6!5bouZN`1GO%^WiW4JPB&{;0e6;Cj@%l-1$5Y;`U$&D)ANv@EJM#j10y0-Uw"
    "Rp;QkdF#rkm&i}ooAJn=RLuMg1q^bD!->js4G&HuI;V*9-bfb+`-N#cP3FB3QUAqTMX!~`+wR{Mq$Qu<d2?ClN)yzCDG0S?LbF9&Y)7Xm`"
    "or24rLfb}~IBJt)0(-d3#cnu2oS_XUWPXZkscKS;YsP=&eE$n>+1`>Dp=n-1>iv;uMlKs3EiTSt*)Ac0@3hTiDR1NF-g9dx?>jI<Wbo-nY"
    "_xY_13Gna*%;I(b%L<(L?+2jq6aj-Mb@>Vqp78kum*}kp&=rRJm=3e|8wbAeZvTB7QTYD}B=A=UhVD%PrxITJy9V3z?gp;x8vKMAa{Ai~C"
    "h>s>"
    "007GUFbO;SC<eawhXPIWzWrtkY5J@MA@_m<4eu5IAO<u07zB#>&HyzMPy8VXE%{3WSN5C(&<d{oWd!H<2Lx;OzX1vmhW&#GlJ{!^iS*6@w"
    "+L7L!Uod%F9R|3DgA5=k^BV)==gL57W32o3<jM1+XEl>SpqomM*a5)@%B>%H~5$X#uLW=tp<krGX&}PuK-&Ol>KB0(D;`FPWayf_z6$_V+"
    "j!Zcmfdh#Q%y7g!^^{i}|SpLG@Ar0SV*$yaW~a0Rpk{1OC1W4*e+y-u8q7gYx?SS_zT-X9OAfvH?u(yZjdk&-u~>mihJs;tU@Ch6QB$YXg"
    "M%X8@lM7yZ5pg8D85==fa&rU$b70|$iq$pX>z!TzNTt^1P&J^1|ux$@Wl&<ODS{{wmWasy%Zbo~$td;25>0Qc7d>Geeb69^0Yj002m_yE)"
    "DLH&XXbNe0!iuX|i@CtSQ`30%_90Q*ANdb=x&irQzM)#%z?e#MPBn-Oz0SB@9&;d2{ss6YNgZ%ylzW8bcJN8ll^9Z{8ECkK@;Q<=)oBlrx"
    "75vl%efYQoaPVONU<JGRuLM;2H354PLHia8^ZCgG4)s|Ag9-@#Z3rg(SOfC*gaA<v`uykyv-q+F&-OwAa0mqbCk3nd4Frqx2mZMX0{vbFU"
    "icIQ"
    "003?Nq6H!Tp8^m3K>@M&oc{F$qx{tZ!TW*&qxFUV1q4g|m;pEYrvO6;rvCQ@SNw<q#`>uNC<W*K-vV^}3IaX*gaAVaf&RY(dHmY~Wc#K7E"
    "(XB<1_R3cgaNGj&Hii$B>uJoLj3vx6Z(PwF9V+aNdf}=;sCGs!2WCnxBSrp&HA4K^$PL+DFZ+JO#+nrPXM(C8U9oReES0e%KP8}<OIO}2?"
    "d1xqXGW;r~j@775)eVtNZr>4*7WiUj*&_S^}8-Edeq33IBiv;r%iLzWYD|8~SMfe*_TzHv)+Kya4g{bpB@q#QgsOvHQ;fSO+oxkOYPO=K-"
    "JlLjTYPF8?D2I{h93HT=~9+XfK+wgM3Q_5ptSIscpn7yf_)$@>QaGx_}gO9htxU;+vJnE?>`V*X?W@BMKCDEqnrl=|BL@dU&DPXfUF&H#7"
    "xS^k;?0sYkitNY^ts0AqhNCQm$)d7(Dz5reZbpAF4llz1L_xf-FKm=F)^aBX|0s%q!GXH}H?)~Nhvip|;p!q!ji3HjG@&SYVQ2_$@*#7<n"
    "ZvK1&;rqY=nfAv2Gy^yNIRdZze*lvUi2f)Bzx*}=iTY{*eg+=@DFhq+5&~KKg#g(Hzy5dwWcob<9Q&#OZv`j*q5`e_SOV_({Qge{c>Zq#{"
    "rdm{"
    "004{sBLnRIO9AlxaRBG~i~sKe82(TJq5b;+H2Vbr!U7ilV*%3r9{>jg82<_ag#JeXnEf>Y;sQ|rn*m1tya4O`$p9q;L;qL;(fu?5;QX-wr"
    "2>2ZoB?D0<p6a3FaP%g{r;5!HvTOE^ZdjAivs=rHUazncL4VLP5-$9r2Sk0AO1-J;|FU03<Ami>HsMHPyho2BL4^j82%*zoBc8Yu>uzVod"
    "R$EL;=+O0suV(I{&=^fc-cD&in-cL<0N%MFC{}hyd37a{opH2mjdtR{ik+xctTcq5|jsRRMDTg8)tY@BUW;Z~pxNmHqkv%L9r3+X12e=>S"
    "pv`2QmWXa70_7yd5+#{8TBT>|s{iUHpJumB<as{cI$QU9p{HU5183;dG*+5$lTWC17ssQ?`PU;hRJ1OG$;ll|`i!u%}&`T>Lf8v&U8QUE~"
    "t9RF<stp0}qQ~kjJRs&}LxdB-I?f?t@WdO(neE%2&*ZmLyto^0{_5$?&!~tLa>;Mw}xBp`U;r`G8^!*zF{`}7Wr~(WBIRTOVrT~%qHUF^!"
    "%Knl875)SPXZyqdvI5BdN&yP~UI57j75}dS3I5#x+x*A?Ap>y#;R1{P;sDzHAplYX68|s)XZ=6{M*U>~WCAV!WC0oeHUaJYbpMM36#p#(a"
    "{Unj"
    "007AUq5)w4u>kP?S^${+qW^XQN&n6O`ToEFAN}e7*#MFL$^aq%AOH>mfB$Cz4FAIbe*TsK)&Zga-vCtqkpOG{fB<CzRR2K%&;E7*rT$a^)"
    "&Zpdv;YwQe*nV%qW{eSY5&mx;QponX8i&HUjbSFr~t<PHvqr=X#XGq+Wz4HhyI`dqXgLh@&IH1zyPNHK>&FIbN`Y7?*6g>{r;r@qydlry8"
    "#&gVgQx?|Nr9wb^qo7vHqR_N&fo(Z~=S&kO0yCQvmb*p#R|kT>ldR)BceF;Qa&uHvw+{ssI-MWdKh7cmFy8|Neadnf{&tMFPzKDFIUdjsU"
    "{`?f)zSrT<_7N&n&ihyJbrTLKpU&;YjnVgP3T<NuWbhX3vWyZ)yD;{DhEJON(+*Z{u%aR6=ppZ{b5asTK5eg0ekIQ|6y6#+2+ssOzHP5|B"
    "ee*caEBme9G82_691Ol`F>;NABoB)#kCIBu1h5u~<4*z@rRQ@;sNC9B~Jpn8KS^zNq(f`H)c>lNnr~bzP!TuEhb^(e1jR5BUfB*^p#Q%~3"
    "PXD6-`~Hjop8e_nssKg*mH^HENdTDwkN=wi%l>)*Oa4j#cLAOM^8iTyvjB$v8vscHssH5w691<Fh5kzb76E1d;sEphivWB6mH+Aie*gUd#"
    "r}{0"
    "007ee-2lh`T>wr0EC9>?*Z<-Gq5pgUWB*0~TmJ3;kN_zEU;sb=6#$?Cx&M#=n*VeFME^Db`2fxTj{uhcPyh=5KL9ZS#s9wmSN}->IsYX98"
    "UfP(VE|+QO#o*9$^YU2xBqAWTK{1HX8-#CzW|~CJpd;EBLK4g!T+iNLH}g{kpF1_Ne0&ci~yehRsbFU5&%L0xBu|~EdN*lb^mDq8v#ZCwg"
    "IdELI5TI5CH1{yZ?3oeE(wr)cyeg!vL`VVE|tLF#sd~%>UB>zyFT_;r>AYk^bQSsQ{+`Z~%t?Hvpsl!vDnpeE&xPIsZcdD*@^MqX4S^N&q"
    "+i)&CIz&;K0(TK{1HcK==gcL7QNi2#iMH2_8b_y67i%>RM_f&Xd%-~QnL%K)|iY5;rxJ^;@C!T<RHp#Nb2F#kIMiT?Nhx&Vj&lK_DKCIF="
    "S%>SzZmH%-7WdBqEDgo2~k^qzcQ~*c+Isp0r%>Ro3UH?n~PX9Fk#{i`Nm;hD(IRGC2wg1Nez5i$ccmG@fQU3=3d;qimW&n8qDFCJZ!T*y0"
    "cmII^P5(gv#s2R9c>s<7TL63i1^|o!xBsaCZ~r|28viu_00F-Lq5z)%SO9td2LSv4u>X?)f&Y2{CjTG+zyQAgV*qpiIsh>L)&EQZy8n*=c"
    ">i$#"
    "007?qcL3i1F#w+b5daSV=KoCqu>U*&hW{e~XZ`E{OaOHMG61Fj69CKr)Bj!o!T&Y@v;QLir~uyoZveLc8vvO9EC8?o-~Uknm;WySV*d~TS"
    "pn()H~`cCHUN|V<NuZb+W%Altp7UzX#f5HcmT=&HUNwNApj}=+y7hur2jPll>aUOy9Db0MgY_QH2}o_CIF-W=Kp8_n*SyMyZ>4Mm;mSh76"
    "N+zG60nS`u~yu*#A-hv;R5(mH+?$aRAo;Hvqu@8UU34>;HiO<Nq@NRsSXchyUXLL;%kJK>)!26#yUq)&E)m)&DgBoc|^OF#!SqRRG5SLjb"
    "V<_5YRt=KqWUu>T|g)BlG6p8%8pKLDct8UT?0@&9lD-~Uzsp8qQVMgQdgeE`<~IRL8vAOK_k<Nta9(El6&U;irrvi|x1asbKyGyul`BLI^"
    "6y#IFqwf{)~qW>}givZ*QMgYhEAOMp82LOZs<Nsv<p#K~IsQ)1VOaRLNR{*sC5CBsD^8alB;r~Yfum3dwl>hYqUI5qsHvq2x6aY{E<Ns#>"
    "bpJm9x&I^pI{*0pQ~=NaIRL@`901b*-2Z?8wf`ajkpD9PhXCaNXaL9mEdZDQ4FGij&;LFEtN$PXjQ<A!W&pkaCIF)UDgdMZ?Ejkp*Z(vCw"
    "*NK&"
    "008;_NdVpd7XZ`$6abt5@c%Rbum2JN)BhI$&-nEJG638E8vxP&3;>4$@c&8x(*F|x+W#Z~Jp}FlH~{JY69CZv5&%g6^8YCS$^RDs!~X^VY"
    "ysc@B>>w08UV`w_Ww=*?f)JC(f<?xO#k@*dH~P=3jmn^2LPr2?*A$Px&Iyj)c+O$y$9<5DFD>}4*<pg5CBmC@c&u>*8dU!s{cv=UI6m{eE"
    "`t^9{|e#{{KP%`2Rcr-v1u}r2qW?DFE63DFD#_5CF3O?*AzO;QuQC-TxN=KmO(aNdU?J5CFRW699tz?*Bai&i@?%-Tx;5Q~>b*9{}S29RS"
    "(?`u|%1@c%CW*#95^*8ejAJOJVUdjQt|7XY{a_WwEn@Bb<Q%>Nw#p#T5>G63)YD*)O56aXFn=l>@F=Kmr9*#8^=ef;hJG63fP9st$<6972"
    "+<^MGR>HjDI#{U!mWdQO2G63TL834xrKLDrz_Wwcv$o~`o!v7%vQUKNeMgY<O7XYLG`2SD<=>InW$Nw7u)&KbaG62^9EC9v-3;?G8@Bb|T"
    "=>Hr5-2V~)#Qp*R7XWboD*)2}5&$g+<^Lc6)c+j-ng0|3^8nocF#zBH6#&ft3jlQh^#3pb-2W5+yZ;9OPXO@$DFD>}6adWs>;GT?>;EVK$"
    "^RPw"
)

BOOKS: Final[NDArray[np.int16]] = (
    np.frombuffer(base64.b85decode(_TEXT), dtype="<i2").reshape(PLANES, STATES).astype(np.int16)
)
"""The value of each state (columns) of each plane (rows), in steps."""
